"""The words of the closed world: sorted tuples, so that a seed means the same world everywhere.

No word is in two lists, so a word determines what kind of thing it names.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(sorted(text.split()))


WOMEN = _words(
    "Agnes Alice Beatrice Clara Dorothy Edith Eleanor Frances Harriet Helen Ida Irene Judith Laura Louise "
    "Mabel Martha Nora Olive Pauline Rosa Sylvia Ursula Violet"
)
MEN = _words(
    "Albert Arthur Bernard Cedric Clement Edgar Edmund Felix Gilbert Harold Hugh Isaac Julian Leonard "
    "Martin Oscar Philip Ralph Roland Samuel Stephen Theodore Victor Walter"
)
SURNAMES = _words(
    "Abbott Ashby Barlow Bishop Blake Brandt Carver Chandler Conway Crane Dalton Drake Ellis Farrow Fisher "
    "Foster Garner Gibson Graves Hale Harper Hobbs Holt Ingram Jarvis Keller Kemp Lambert Lane Lowell Marsh "
    "Mercer Mills Nash Norris Osborne Page Palmer Pike Porter Quinn Reeves Rhodes Sawyer Shaw Slater Stokes "
    "Swift Thorne Tucker Turner Vance Wade Walsh Webb Weaver Whitlock Winter Wyatt Yates"
)
COUNTRIES = _words("Austria Canada Denmark England Finland Ireland Norway Portugal Scotland Wales")
TOWNS = _words(
    "Aldham Ambry Arden Barstow Belford Bolton Brenton Bruford Calder Carnby Chelby Corley Cranford Dalry "
    "Deeping Derwent Dunmore Eastby Elmdale Everton Fairlea Farnham Fenwick Galston Glenby Grafton Halden "
    "Harwick Hexby Holbrook Ilford Ivybridge Kelso Kirkby Langton Larkhill Leyburn Linford Lorne Malden "
    "Marlow Melby Milford Newbury Norwell Oakley Orford Penrith Pinford Ramsey Redcar Rothby Saltash Selby "
    "Shelford Stanhope Stowe Tarrant Thurso Tilbury Upton Verwood Wareham Wexcombe Whitby Wigton Winslow "
    "Wolford Yarrow Zennor"
)
UNIVERSITIES = _words(
    "Ackland Bewick Cavell Darnell Erskine Fawley Granby Hadley Inverness Jessop Kendrick Lydgate Morley "
    "Newnham Orwell Pembury Radley Selwyn Trevor Wadham"
)
AWARDS = _words(
    "Amber Beacon Cedar Comet Compass Coral Crystal Emerald Falcon Granite Heron Ivory Jasper Laurel Marble "
    "Opal Pearl Ruby Sapphire Topaz"
)
AWARD_KINDS = ("Medal", "Prize")
INSTRUMENTS = _words(
    "accordion banjo bassoon bugle cello clarinet cornet flute guitar harp lute mandolin oboe organ piano "
    "trombone trumpet tuba viola violin"
)
ADJECTIVES = _words(
    "Bitter Broken Burning Crimson Distant Empty Endless Frozen Gentle Golden Hidden Hollow Lonely Lost "
    "Painted Patient Quiet Restless Scarlet Secret Silent Silver Velvet Wandering"
)
NOUNS = _words(
    "Anchor Bridge Candle Castle Feather Forest Garden Harbour Island Journey Lantern Letter Meadow Mirror "
    "Mountain Orchard Promise River Shadow Station Stranger Summer Tower Winds"
)
FIRMS = _words(
    "Apex Atlas Borealis Castor Delphi Dynamo Electra Galaxy Helios Juno Kestrel Lumen Meridian Nimbus Orion "
    "Phoenix Polaris Quasar Regent Saturn Solaris Titan Vega Vulcan Zenith"
)
FIRM_KINDS = ("Foundry", "Holdings", "Motors", "Press", "Studios", "Textiles")

ALL = (
    *(*WOMEN, *MEN, *SURNAMES, *COUNTRIES, *TOWNS, *UNIVERSITIES, *AWARDS, *AWARD_KINDS),
    *(*INSTRUMENTS, *ADJECTIVES, *NOUNS, *FIRMS, *FIRM_KINDS),
)
