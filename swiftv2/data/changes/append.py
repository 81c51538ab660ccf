"""Adding runs to a store: they come behind those that are there, which keep their rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

from swiftv2.config.base import Config
from swiftv2.config.clean import CleanConfig
from swiftv2.config.data import GridConfig
from swiftv2.data.changes.assemble import take
from swiftv2.data.changes.drop import finish_drop
from swiftv2.data.changes.plan import UNTOUCHED, Options, choose_salt, source_digest
from swiftv2.data.changes.publish import BuildReport, Job, refuse_unused_labels, report_again
from swiftv2.data.changes.tally import Progress
from swiftv2.data.changes.versions import Base, finish_append, read_base
from swiftv2.data.ingest.discover import discover
from swiftv2.data.ranks import Alone, Communicator, on_first
from swiftv2.data.store import layout
from swiftv2.errors import UsageError

AS_IT_IS = GridConfig()
_MAY_DIFFER = ("space", "resample")
"""Settings of the grid that say something of the files that are read, not of the store."""


def append(
    source: str | Path,
    store: Path,
    cohort: str,
    *,
    grid: GridConfig = AS_IT_IS,
    labels: Path | Sequence[Path] | None = None,
    comm: Communicator | None = None,
    progress: Callable[[Progress], None] | None = None,
    expect_tr: float | None = None,
    keep_float: bool = False,
    salt: str | None = None,
    strict: bool = False,
    compression: layout.Compression | None = None,
    clean: CleanConfig = UNTOUCHED,
) -> BuildReport:
    """Add runs to a store, or go on with an append that was interrupted; ranks and interruptions do not matter.

    Grid, codec, salt and cleaning are the store's. Readers see the former version until all is done.

    Args:
        source: a BIDS-derivatives folder or a glob of NIfTI files; files that are in the store already are passed over.
        store: folder of the store.
        cohort: name of the cohort: a new one, or one that the store has.
        grid: what is set in it must be as the store has it; `resample` may be said anew, and `space`, which must be the
            store's, must be where neither names nor side-cars tell it.
        labels: TSV or CSV label tables, which add to the store's; a folder's own when None.
        comm: the ranks that work together; this process alone when None.
        progress: called on rank 0 every few seconds, in a thread of its own, and at the end.
        expect_tr: repetition time in seconds that every new run must have.
        keep_float: whether runs that are no integers stay float32, too where the store was built without this.
        salt: the store's, if any is given.
        strict: whether any refusal is an error (the finished runs are kept for the next attempt).
        compression: the store's, if any is given.
        clean: what is set in it must be as the store has it.

    Raises:
        UsageError: nothing found, settings or labels that contradict the store's, labels without a run that would bring
            them, or another append is unfinished.
        SwiftError: no store, no run can be taken, a refusal under `strict`, or a failure to write.
    """
    ranks = comm or Alone()
    base = on_first(ranks, lambda: _ready(store))
    options = on_first(ranks, lambda: _options(base, grid, cohort, expect_tr, clean, compression, keep_float=keep_float))
    discovery = on_first(ranks, lambda: discover(source, labels))
    chosen = on_first(ranks, lambda: choose_salt(store, salt))
    digest = source_digest(discovery.sources, options, chosen)
    known = on_first(ranks, lambda: _already_there(base, digest))
    job = Job(store, discovery, options, chosen, base, strict)
    report = take(job, ranks, progress) if known is None else known
    if labels is not None and report.nothing_to_do:
        on_first(ranks, lambda: refuse_unused_labels(job))
    return report


def _ready(store: Path) -> Base:
    """The newest version, after what a killed command left to do is done."""
    layout.read_attributes(store)
    finish_drop(store)
    finish_append(store)
    return read_base(store)


def _options(
    base: Base,
    grid: GridConfig,
    cohort: str,
    expect_tr: float | None,
    clean: CleanConfig,
    compression: layout.Compression | None,
    *,
    keep_float: bool,
) -> Options:
    """The store's options, with what may be said anew.

    Raises:
        UsageError: something that is given is not as the store has it.
    """
    kept = base.attributes["options"]
    if grid.space not in (None, base.grid.space):
        raise UsageError(f"grid.space={grid.space}, but the runs of {base.store} lie in {base.grid.space}: build another store")
    if compression not in (None, kept["compression"]):
        raise UsageError(f"{base.store} was built with --compression {kept['compression']}: an append takes the same")
    own_grid, own_clean = GridConfig.model_validate(kept["grid"]), CleanConfig.model_validate(kept["clean"])
    _agree(base.store, "grid", grid, own_grid)
    _agree(base.store, "clean", clean, own_clean)
    resample = grid.resample if "resample" in grid.model_fields_set else own_grid.resample
    return Options(
        grid=own_grid.model_copy(update={"space": grid.space, "resample": resample}),
        cohort=cohort,
        expect_tr=expect_tr,
        keep_float=keep_float or bool(kept["keep_float"]),
        compression=kept["compression"],
        clean=own_clean,
    )


def _agree(store: Path, section: str, given: Config, own: Config) -> None:
    for name in sorted(given.model_fields_set):
        value, known = getattr(given, name), getattr(own, name)
        if value != known and not (section == "grid" and name in _MAY_DIFFER):
            raise UsageError(
                f"{section}.{name}={value}, but {store} was built with {known}: leave it out, or build another store"
            )


def _already_there(base: Base, digest: str) -> BuildReport | None:
    """The report of the change that took all of these files; None where there was none, or files were refused."""
    change = base.history(digest)
    if change is None or change["refused"]:
        return None
    return report_again(base.store, int(change["version"]), base.runs)
