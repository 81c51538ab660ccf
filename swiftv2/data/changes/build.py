"""Building a store from NIfTI files."""

from collections.abc import Callable, Sequence
from pathlib import Path

from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.assemble import take
from swiftv2.data.changes.plan import UNTOUCHED, Options, choose_salt, source_digest
from swiftv2.data.changes.publish import BuildReport, Job, refuse_unused_labels, report_again
from swiftv2.data.changes.tally import Progress
from swiftv2.data.changes.versions import finish_append, read_base
from swiftv2.data.ingest.discover import discover
from swiftv2.data.ranks import Alone, Communicator, on_first
from swiftv2.data.store import layout
from swiftv2.data.store.reader import Store
from swiftv2.errors import UsageError


def build(
    source: str | Path,
    store: Path,
    grid: GridConfig,
    cohort: str,
    *,
    labels: Path | Sequence[Path] | None = None,
    comm: Communicator | None = None,
    progress: Callable[[Progress], None] | None = None,
    expect_tr: float | None = None,
    keep_float: bool = False,
    salt: str | None = None,
    strict: bool = False,
    compression: layout.Compression = "lz4",
    clean: CleanConfig = UNTOUCHED,
) -> BuildReport:
    """Build a store, or go on with a build that was interrupted; the result does not depend on ranks or interruptions.

    Args:
        source: a BIDS-derivatives folder or a glob of NIfTI files.
        store: folder of the store; new, unfinished, or complete from the same source (then nothing is done).
        grid: the window in world coordinates.
        cohort: name of the cohort.
        labels: TSV or CSV label tables; a folder's own when None.
        comm: the ranks that build together; this process alone when None.
        progress: called on rank 0 every few seconds, in a thread of its own, and at the end.
        expect_tr: repetition time in seconds that every run must have.
        keep_float: whether runs that are no integers stay float32 rather than being scaled to 16 bits.
        salt: salt of the pseudonymous keys; random when None. One salt makes the keys of several stores comparable.
        strict: whether any refusal is an error (the finished runs are kept for the next attempt).
        compression: codec of the arrays.
        clean: how time courses are cleaned; untouched by default.

    Raises:
        UsageError: nothing found, mixed spaces, a destination that holds something else, or labels that a store which is
            there already does not have.
        SwiftError: no run can be taken, a refusal under `strict`, or a failure to write.
    """
    ranks = comm or Alone()
    options = Options(grid, cohort, expect_tr, keep_float, compression, clean)
    discovery = on_first(ranks, lambda: discover(source, labels))
    chosen = on_first(ranks, lambda: choose_salt(store, salt))
    digest = source_digest(discovery.sources, options, chosen)
    known = on_first(ranks, lambda: _already_built(store, digest))
    if known is not None:
        if labels is not None:
            on_first(ranks, lambda: refuse_unused_labels(Job(store, discovery, options, chosen, read_base(store), strict)))
        return known
    return take(Job(store, discovery, options, chosen, None, strict), ranks, progress)


def _already_built(store: Path, digest: str) -> BuildReport | None:
    if not layout.is_complete(store):
        return None
    if layout.read_attributes(store).get("sources") != digest:
        raise UsageError(
            f"{store} holds a store of other files or options: give another folder, remove it first, or `swiftv2 store append`"
        )
    finish_append(store)
    return report_again(store, 1, Store.open(store).runs)
