"""From a name and options to a retriever: the one place that knows the parts of this package."""

from __future__ import annotations

import logging

from search_r1.search.errors import RetrieverError
from search_r1.search.online.engines import ENGINES, LIST_PRICES_OF, Engine
from search_r1.search.online.mock import MockRetriever
from search_r1.search.online.options import MOCK, ONLINE_NAMES, OnlineMode, OnlineOptions
from search_r1.search.online.retriever import OnlineRetriever
from search_r1.search.online.store import OnlineStore
from search_r1.search.online.transport import Transport
from search_r1.search.retriever import Retriever

logger = logging.getLogger(__name__)


def build_online(engine: str, *, options: OnlineOptions) -> Retriever:
    """One of ONLINE_NAMES, ready to search. Raises RetrieverError for what is missing: key, file, price."""
    if engine not in ONLINE_NAMES:
        raise RetrieverError(f"no online engine {engine!r}; expected one of {', '.join(ONLINE_NAMES)}")
    if options.mock or engine == MOCK:
        logger.warning(
            "MOCK SEARCH in place of %s: every document is made up from its query, nothing is searched",
            engine,
        )
        return MockRetriever(engine=engine)
    known = ENGINES[engine]
    replays = options.mode is OnlineMode.REPLAY
    if not replays:
        _check_keys(known, options)
        _check_price(known, options)
        _check_address(known, options)
    transport = None if replays else _connect(known, options)
    store = OnlineStore(options.cache_path, read_only=replays) if options.cache_path else None
    logger.info("online engine %s, %s", engine, _say_use(known, options))
    return OnlineRetriever(known, options=options, store=store, transport=transport)


def _connect(engine: Engine, options: OnlineOptions) -> Transport:
    url = options.url or engine.url
    return Transport(
        engine,
        url=url,
        keys=options.keys,
        proxy=options.proxy_for(url),
        max_connections=options.num_parallel_calls,
    )


def _check_keys(engine: Engine, options: OnlineOptions) -> None:
    missing = [name for name in engine.key_variables if name not in options.keys]
    if missing:
        fix = "set it, or try without one by --mock_search"
        raise RetrieverError(
            f"--retriever_name {engine.name} needs {' and '.join(missing)} in the environment; {fix}"
        )


def _check_price(engine: Engine, options: OnlineOptions) -> None:
    if options.spend_cap_usd is not None and options.price_of(engine) is None:
        raise RetrieverError(
            f"--spend_cap_usd needs a price: {engine.name} publishes none; say what 1,000 queries cost you "
            "with --price_per_1000_usd"
        )


def _check_address(engine: Engine, options: OnlineOptions) -> None:
    if engine.is_retired and options.url is None:
        raise RetrieverError(
            f"--retriever_name {engine.name}: {engine.url} was retired; name a service that speaks its "
            "format with --online_url"
        )


def _say_use(engine: Engine, options: OnlineOptions) -> str:
    mode = f"mode {options.mode}"
    file = f"{mode}, file {options.cache_path}" if options.cache_path else mode
    if options.spend_cap_usd is None:
        return file
    assumed = "" if options.price_per_1000_usd is not None else f" (list price of {LIST_PRICES_OF})"
    price = f"{options.price_of(engine):g} USD for 1,000 queries{assumed}"
    return f"{file}, at most {options.spend_cap_usd:g} USD at {price}"
