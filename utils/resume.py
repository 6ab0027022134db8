"""Going on where a stopped run was: its state, and whether it is the same run."""

import json
import os
import shlex
import sys

import torch

from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import digest_file

STATE = "resume.pt"
# Options that change no number: where things lie, what else is logged, and whether to resume.
PLACES = {"data_root", "checkpoint_root", "log_root", "name", "tensorboard", "resume"}


class Resumable:
    """The state of one run, in its results folder; a kill at any moment leaves the last whole one.

    Args:
        folder: the run's results folder.
        options: all of the run's options; a state belongs to those it was written with.
        resume: whether the user asked to go on. Without that, the first `save` replaces an older run's state.

    `kept` says what there is to go back to, for the message of a run that fails.
    """

    def __init__(self, folder: str, options: dict, resume: bool):
        self.path, self.figures = os.path.join(folder, STATE), os.path.join(folder, "metrics.json")
        self.options = _numbers(options)
        self.resume, self.kept = resume, "no weights are kept yet"

    def finished(self) -> bool:
        """Whether the user asked to go on with a run that has ended.

        Raises:
            UserError: one has, but with other options.
        """
        if not self.resume or os.path.exists(self.path):
            return False
        try:
            with open(self.figures) as file:
                self._check(json.load(file)["config"], self.figures)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False  # no figures, no run that ended
        return True

    def read(self, poisoned: torch.Tensor) -> dict | None:
        """The checkpoint to go on from, with "training" for utils.training.train; None: start at the beginning.

        Args:
            poisoned: (n,) which images are poisoned, drawn anew; the data must be what it was.

        Raises:
            UserError: the state belongs to another run, or cannot be read.
        """
        if not os.path.exists(self.path):
            if self.resume:
                print(f"no state to resume at {self.path}: starting at the beginning")
            return None
        if not self.resume:
            print(f"{self.path}, left by a run that was stopped, is replaced after the first epoch; --resume goes on")
            return None
        state = read_checkpoint(self.path)
        kinds = {"options": dict, "training": dict, "poisoned": torch.Tensor}
        if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
            raise UserError(f"{self.path} is not the state of a training; start anew without --resume")
        self._check(state["options"], self.path)
        if not torch.equal(state["poisoned"], poisoned):
            raise UserError(f"{self.path} was written with other data than --data_root has now")
        print(f"going on from {self.path}")
        self.kept = self._told_kept()
        return state

    def save(self, model, training: dict, poisoned: torch.Tensor, **facts) -> None:
        """Write the state after an epoch: a checkpoint that main.py reads too, with all that training goes on from."""
        save_checkpoint(self.path, model, **facts, options=self.options, poisoned=poisoned, training=training)
        self.kept = self._told_kept()

    def end(self) -> None:
        """The run's results are written: its state is no longer needed."""
        if os.path.exists(self.path):
            os.unlink(self.path)

    def _told_kept(self):
        return f"the weights of the last good epoch are in {self.path}, which main.py --model reads"

    def _check(self, stored, path):
        """Refuse options other than those stored."""
        stored = _numbers(stored)
        other = [name for name in self.options | stored if stored.get(name) != self.options.get(name)]
        if other:
            told = ", ".join(f"--{name} {stored.get(name)} (not {self.options.get(name)})" for name in other)
            raise UserError(f"{path} belongs to a run with {told}; resume with those, or start anew without --resume")


def _numbers(options: dict) -> dict:
    """The options that numbers depend on; where a folder's pictures lie is which pictures they are."""
    other = PLACES - {"data_root"} if options.get("dataset") == "folder" else PLACES
    return {name: value for name, value in options.items() if name not in other}


def finished_run(folder: str, options: dict, model: str) -> dict | None:
    """metrics.json of a run of main.py, if there is one of these options on this very file; a run writes it last."""
    try:
        with open(os.path.join(folder, "metrics.json")) as file:
            metrics = json.load(file)
        same = metrics["model_sha256"] == digest_file(model) and isinstance(metrics["before"], dict)
        kept, stored = ({**_numbers(told), "model": None} for told in (options, metrics["config"]))
        return metrics if same and kept == stored else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def resume_command() -> str:
    """This command line again, to go on where it was stopped."""
    count = os.environ.get("WORLD_SIZE", "1")
    runner = ["python"] if count == "1" else ["torchrun", f"--nproc_per_node={count}"]
    return shlex.join([*runner, *(word for word in sys.argv if word != "--resume"), "--resume"])
