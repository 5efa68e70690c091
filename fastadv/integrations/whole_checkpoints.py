"""Make a Trainer's checkpoints whole: one that has its name has all of its files, on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastadv.integrations import checkpoints, files
from fastadv.integrations.checkpoints import STATE, CheckpointError, Choice
from fastadv.integrations.full_disk import is_full

UNFINISHED = "unfinished"  # the folder that a checkpoint is written to, and leaves when it is whole

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class WholeCheckpoints(_Trainer):
    """Write each checkpoint elsewhere, and give it its name when all of it is on the disk.

    A kill, an error or a power cut at any time leaves no checkpoint that is not whole, and the older one is deleted
    after the newer one has its name. A subclass adds its own files (`save_more`) and says what it misses (`flaw`).
    """

    resumed: Path | None = None
    _saving = False
    _to_push = False

    # Going on

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; `resume_from_checkpoint=True` takes the newest checkpoint that is whole.

        Raises:
            CheckpointError: a ValueError; there is none, or the one that is named is not whole.
        """
        self.resumed = self._chosen(resume_from_checkpoint)
        if self.args.local_process_index == 0:
            shutil.rmtree(Path(str(self.args.output_dir), UNFINISHED), ignore_errors=True)
        return super().train(None if self.resumed is None else str(self.resumed), *args, **kwargs)

    def newest(self) -> Choice:
        """Choose the newest whole checkpoint of the output folder."""
        return checkpoints.newest(Path(str(self.args.output_dir)), self.flaw)

    def flaw(self, checkpoint: Path) -> str | None:
        """Say why training cannot go on from a checkpoint; None where it can."""
        return checkpoints.flaw(checkpoint)

    def _chosen(self, resume: str | bool | None) -> Path | None:
        if isinstance(resume, (str, os.PathLike)) and str(resume):
            wrong = self.flaw(Path(resume))
            if wrong is not None:
                raise CheckpointError(
                    f"{resume} cannot be resumed from: {wrong}. resume_from_checkpoint=True takes the newest that "
                    "is whole"
                )
            return Path(resume)
        if not resume:
            return None
        checkpoint, passed_over = self.newest()
        for message in passed_over:
            self.tell(message)
        if checkpoint is None:
            raise CheckpointError(
                f"No valid checkpoint found in output directory ({self.args.output_dir}): train afresh, without "
                "resume_from_checkpoint"
            )
        return checkpoint

    def tell(self, message: str) -> None:
        """Tell the user which checkpoint is passed over, and why."""
        warnings.warn(message, stacklevel=4)

    # Saving

    def save_more(self, checkpoint: Path) -> None:
        """Save what this process adds to a checkpoint, whose folder may not be there yet."""

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._saving else folder  # noqa: PTH118 - the Trainer adds to it

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving:
            self._to_push = True  # when it has its name
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        whole = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        unfinished = folder / UNFINISHED / whole.name
        self._saving, self._to_push = True, False
        try:
            self.save_more(unfinished)
            super()._save_checkpoint(model, trial)
            self._name_best(unfinished, whole)
            self._publish(unfinished, whole)
        except BaseException as error:
            full = is_full(error, folder)
            shutil.rmtree(unfinished.parent, ignore_errors=True)
            if full:
                raise OSError(errno.ENOSPC, _full(whole)) from error
            raise
        finally:
            self._saving = False
        if self._to_push:
            self._push_from_checkpoint(str(whole))
        if self.args.should_save:
            self._rotate(whole)

    def _name_best(self, unfinished: Path, whole: Path) -> None:
        """Tell the Trainer's state where the best checkpoint will lie: it looked for it beside the unfinished one."""
        step = self.state.best_global_step
        best = whole.with_name(f"{PREFIX_CHECKPOINT_DIR}-{step}")
        if step and (best == whole or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / STATE))

    def _publish(self, unfinished: Path, whole: Path) -> None:
        """Give a checkpoint its name, when every process has written its part."""
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            _move(unfinished, whole)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and unfinished.is_dir():  # a node with a disk of its own
            _move(unfinished, whole)

    def _rotate(self, newest: Path) -> None:
        """Delete the oldest checkpoints beyond `save_total_limit`; never the newest, nor the best."""
        limit = self.args.save_total_limit
        if not limit or limit < 0:
            return
        kept = {newest.name, Path(self.state.best_model_checkpoint or "").name}
        found = sorted(checkpoints.all_in(newest.parent), key=lambda one: one.stat().st_mtime_ns)
        others = [one for one in found if one.name not in kept]
        for checkpoint in others[: max(0, len(found) - max(limit, len(found) - len(others)))]:
            shutil.rmtree(checkpoint, ignore_errors=True)


def _move(unfinished: Path, whole: Path) -> None:
    files.sync_tree(unfinished)
    if whole.exists():  # of an earlier training, or not whole
        whole.rename(unfinished.with_name(f"replaced-{whole.name}"))
    unfinished.rename(whole)
    files.sync(whole.parent)
    shutil.rmtree(unfinished.parent, ignore_errors=True)


def _full(whole: Path) -> str:
    return (
        f"the disk is full: {whole} is not saved, and the checkpoints before it are kept. Make room, then "
        "train(resume_from_checkpoint=True) goes on"
    )
