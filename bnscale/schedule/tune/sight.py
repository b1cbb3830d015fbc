"""Whether every node of the cluster sees the same store."""

import secrets
from typing import Self

from bnscale.schedule.tune.nodes import Reply, node_names, on_every_node, this_node
from bnscale.storage import Storage, StoreFailure, storage
from bnscale.trial import Refusal

BLIND = "sees nothing of what is written elsewhere"


def sight(store: Storage) -> dict[str, str | None]:
    """What is wrong with the sight of each node, by its name: each writes a key, and must see all others'."""
    with _Keys(store) as keys:
        replies = keys.ask()
        wrong = {reply.name: keys.wrong(reply) for reply in replies}
        seeing = {reply.node: reply.name for reply in replies if wrong[reply.name] is None}
        for reply in on_every_node(_reads, store.url, keys.folder, seeing):
            if reply.node in seeing:
                wrong[reply.name] = reply.error or reply.found
        return wrong


def check_sight(store: Storage) -> None:
    """Raises `Refusal` where a node that is there, and answers, does not see the store that this process sees."""
    if len(node_names()) < 2:
        return
    with _Keys(store) as keys:
        wrong = {reply.name: keys.wrong(reply) for reply in keys.ask() if not reply.lost}
    blind = {name: error for name, error in wrong.items() if error}
    if blind:
        raise Refusal(
            f"store {store.url}: {', '.join(blind)}: {next(iter(blind.values()))}; mount the same folder on every "
            f"node, or give a bucket with --store s3://...; `bnscale doctor --cluster --store {store.url}` shows each"
        )


class _Keys:
    """A folder of the store with a key of the driver and one of every node that sees it."""

    def __init__(self, store: Storage) -> None:
        self.store = store
        self.folder = f"doctor-{secrets.token_hex(8)}"

    def __enter__(self) -> Self:
        self.store.write(f"{self.folder}/driver", b"")
        return self

    def __exit__(self, *raised: object) -> None:
        self.store.remove(self.folder)

    def ask(self) -> list[Reply[str | None]]:
        return on_every_node(_writes, self.store.url, self.folder)

    def wrong(self, reply: Reply[str | None]) -> str | None:
        """What is wrong with the node that replied."""
        if reply.error or reply.found:
            return reply.error or reply.found
        seen = self.store.size(f"{self.folder}/{reply.node}") is not None
        return None if seen else "what it writes is not seen elsewhere"


def _writes(url: str, folder: str) -> str | None:
    """Leave this node's key where the driver's is: a store that it does not see is not made."""
    store = storage(url)
    try:
        if store.size(f"{folder}/driver") is None:
            return BLIND
        store.write(f"{folder}/{this_node()}", b"")
    except StoreFailure as error:
        return str(error)
    return None


def _reads(url: str, folder: str, others: dict[str, str]) -> str | None:
    store = storage(url)
    try:
        unseen = [name for node, name in others.items() if store.size(f"{folder}/{node}") is None]
    except StoreFailure as error:
        return str(error)
    return f"does not see what {', '.join(unseen)} wrote" if unseen else None
