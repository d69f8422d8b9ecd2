from __future__ import annotations

import os

import psutil

from verl.workers.parallel import Rendezvous


def test_the_rendezvous_listens_on_its_host_alone_until_it_ends() -> None:
    server = Rendezvous()
    groups = {server.new_group(), server.new_group()}
    assert len(groups) == 2
    port = int(groups.pop().split(":")[2].split("/")[0])

    def listening() -> list[str]:
        found = psutil.Process(os.getpid()).net_connections("tcp")
        return [c.laddr.ip for c in found if c.laddr.port == port and c.status == psutil.CONN_LISTEN]

    assert listening() == ["127.0.0.1"]
    del server
    assert listening() == []
