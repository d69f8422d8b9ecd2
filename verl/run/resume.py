"""Find the step from which a run resumes, list what changed since, refuse to hide lost checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from serving.redaction import redact
from verl.errors import ConfigError
from verl.run.folder import has_records, set_aside_records, set_aside_run
from verl.run.manifest import MANIFEST_FILE, Manifest, read_manifest, update_manifest
from verl.run.progress import Identity, Progress
from verl.run.tracking import read_metrics
from verl.trainer.config.schema import ONE_STEP_OFF, Config
from verl.utils.flatten import flatten
from verl.workers.checkpoint import CHECKPOINTS, EXPORT, POLICY, CheckpointStore

logger = logging.getLogger(__name__)


def find_progress(
    config: Config, run_dir: Path, *, total_steps: int, identity: Identity, manifest: Manifest
) -> tuple[CheckpointStore, Progress, Path | None]:
    """Return the newest good checkpoint of the run folder, or a new start; move later records aside.

    Raises ConfigError if checkpoints are damaged, missing or those of another run, or nothing is left to do.
    """
    trainer = config.trainer
    if trainer.resume_mode == "disable" and (previous := set_aside_run(run_dir)):
        logger.info("trainer.resume_mode=disable: the earlier run was moved to %s", previous)
    checkpoints = CheckpointStore(
        run_dir / CHECKPOINTS,
        keep=trainer.max_checkpoints_to_keep,
        on_write=lambda step: update_manifest(run_dir, saved_step=step),
    )
    # Read before a new manifest replaces it: it says what the run had saved and with which settings.
    earlier = read_manifest(run_dir) or {}
    newest = checkpoints.latest()
    if newest is None:
        # Without a checkpoint nothing can continue; lost ones are an error, records alone are kept aside.
        refuse_lost_checkpoints(run_dir, checkpoints.damages, saved_step=earlier.get("saved_step"))
        if has_records(run_dir):
            logger.warning(
                "an earlier run ended before its first checkpoint (%s); it was moved to %s, a new one starts",
                earlier.get("reason") or earlier.get("status") or "no manifest",
                set_aside_run(run_dir),
            )
        return checkpoints, Progress(), None
    if not (newest / POLICY).is_dir():
        raise ConfigError(
            f"{newest} was written by an earlier version of this program, whose format is not read any more; "
            f"start another run from {newest / EXPORT} with actor_rollout_ref.model.path and another "
            "trainer.experiment_name"
        )
    progress = Progress.load(newest, identity=identity)
    if progress.step >= total_steps and not trainer.evaluates_only:
        raise ConfigError(
            f"the run in {run_dir} has done {progress.step} of {total_steps} steps: nothing is left. Raise "
            "trainer.total_training_steps (and total_epochs) to go on, evaluate with trainer.val_only=true, "
            "or start another run with another trainer.experiment_name or with trainer.resume_mode=disable"
        )
    logger.info("going on from %s (trainer.resume_mode=auto)", newest)
    if trainer.schedule == ONE_STEP_OFF and not trainer.evaluates_only:
        logger.info(
            "trainer.schedule=one_step_off: step %d is sampled again, with the weights of step %d instead of "
            "older ones, so that the run is not the unbroken one bit for bit",
            progress.step + 1,
            progress.step,
        )
    _warn_of_differences(run_dir, progress, earlier=earlier, manifest=manifest)

    # Each (kind, step) appears once in the records, so that those written again must go first.
    def is_repeated(kind: str, step: int) -> bool:
        return (kind, step) == ("val", progress.step) if trainer.evaluates_only else step > progress.step

    if (previous := set_aside_records(run_dir, is_repeated)) is not None:
        logger.info("records that this run writes again were moved to %s", previous)
    return checkpoints, progress, newest


def _warn_of_differences(run_dir: Path, progress: Progress, *, earlier: Manifest, manifest: Manifest) -> None:
    """Log what is missing of the earlier run, and what changed since."""
    if (earlier.get("saved_step") or 0) > progress.step:
        logger.warning(
            "step %d was saved, but its checkpoint cannot be used: the steps after %d are done again",
            earlier["saved_step"],
            progress.step,
        )
    recorded = {line["step"] for line in read_metrics(run_dir) if line["kind"] == "train"}
    if missing := set(range(1, progress.step + 1)) - recorded:
        logger.warning("%d of %d finished steps are missing in metrics.jsonl", len(missing), progress.step)
    if not earlier:
        logger.warning("%s is missing: what changed since the last start is unknown", MANIFEST_FILE)
    for change in list_changes(earlier, manifest):
        logger.warning("changed since the last start of this run: %s", change)


def refuse_lost_checkpoints(run_dir: Path, damages: Mapping[Path, str], *, saved_step: int | None) -> None:
    """Raise ConfigError if the run folder has lost checkpoints: a new run would hide that."""
    root = run_dir / CHECKPOINTS
    if damages:
        found = "every checkpoint is damaged: " + "; ".join(f"{f.name}: {why}" for f, why in damages.items())
    elif saved_step is not None:
        found = f"step {saved_step} was saved, but there is no checkpoint (is a volume not mounted?)"
    else:
        return
    raise ConfigError(
        f"{root}: {found}. Restore the checkpoints, or set trainer.resume_mode=disable, which moves all "
        f"that is left of this run to {run_dir}/previous-<time>/ and starts a new one"
    )


def list_changes(earlier: Manifest, manifest: Manifest) -> list[str]:
    """Return what differs between the manifests of a run and of its resumption, as `key: old -> new`.

    Settings, held-out data and the retriever's index: the run may continue with others, but its scores before
    and after cannot be compared. Training data and model may not change: see `run_identity`.
    """
    old, new = (flatten(redact(each.get("config") or {})) for each in (earlier, manifest))
    before, after = old | _file_facts(earlier), new | _file_facts(manifest)
    keys = sorted(before.keys() & after.keys() - {"trainer.val_only"})
    changes = [f"{key}: {before[key]!r} -> {after[key]!r}" for key in keys if before[key] != after[key]]
    return changes + [
        f"{key}: {old[key]!r} -> no longer a setting" for key in sorted(old.keys() - new.keys())
    ]


def _file_facts(manifest: Manifest) -> dict[str, object]:
    """Return hashes of data and prompt files and facts of the retriever by name."""
    facts: dict[str, object] = {}
    for file in (*(manifest.get("data") or []), manifest.get("prompt_file") or {}):
        facts[f"sha256 of {file.get('path')}"] = file.get("sha256")
    return facts | retriever_facts(manifest)


def retriever_facts(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return what the passages depend on, by dotted name; empty if the retriever does not describe itself."""
    found: object = manifest.get("services")
    for name in ("retriever", "version", "retriever"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return flatten(found, "retriever.index.") if isinstance(found, Mapping) else {}
