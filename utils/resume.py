"""Resume an interrupted training or comparison, after checking that the options are the same."""

import json
import os
import shlex
import sys

import torch

from utils.checkpoint import read_checkpoint, save_checkpoint
from utils.errors import UserError
from utils.files import remove_file, sha256_of

STATE_FILE, METRICS_FILE = "resume.pt", "metrics.json"
# Options that do not affect the results.
NON_RESULT_OPTIONS = {"data_root", "checkpoint_root", "log_root", "name", "tensorboard", "resume", "seeds"}


class Resumable:
    """The state of a training in its results folder, written after each epoch.

    `recovery_hint` says where the weights are, for the error message of a training that fails.

    Args:
        folder: the results folder of the run.
        options: all options of the run; a state is only resumed with the options it was written with.
        resume: whether the user passed --resume. Without it, the first `save` replaces an older run's state.
    """

    def __init__(self, folder: str, options: dict, resume: bool):
        self.path, self.metrics_path = os.path.join(folder, STATE_FILE), os.path.join(folder, METRICS_FILE)
        self.options, self.resume = _result_options(options), resume
        self.recovery_hint = "no weights have been saved yet"

    def finished(self) -> bool:
        """Whether the run to resume has already finished.

        Raises:
            UserError: it has, but with other options.
        """
        if not self.resume or os.path.exists(self.path):
            return False
        try:
            with open(self.metrics_path) as file:
                self._check(json.load(file)["config"], self.metrics_path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False
        return True

    def read(self, data: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict | None:
        """Read the checkpoint to resume from.

        Args:
            data: (n + N,) indices of the n poisoned training images, and all labels; as in the interrupted run.
            tensors: of the attack, its picture, patch or warp; likewise.

        Returns:
            the checkpoint, with the `resume` state of utils.training.train under "training"; None to start at epoch 1.

        Raises:
            UserError: the state belongs to another run, or cannot be read.
        """
        if not os.path.exists(self.path):
            if self.resume:
                print(f"no state to resume at {self.path}: starting from epoch 1")
            return None
        if not self.resume:
            print(f"{self.path} of an interrupted run is replaced after the first epoch; --resume continues that run")
            return None
        state = read_checkpoint(self.path)
        types = {"options": dict, "training": dict, "data": torch.Tensor, "attack": dict}
        if not all(isinstance(state.get(name), expected) for name, expected in types.items()):
            raise UserError(f"{self.path} is not the state of a training; start anew without --resume")
        self._check(state["options"], self.path)
        if not torch.equal(state["data"], data):
            raise UserError(f"{self.path} was written with other data than that in --data_root")
        if not _is_same(state["attack"].get("tensors"), tensors):
            raise UserError(f"{self.path} was written with another trigger; start anew without --resume")
        print(f"resuming from {self.path}")
        self._set_recovery_hint()
        return state

    def save(self, model, training: dict, data: torch.Tensor, **metadata) -> None:
        """Write the state after an epoch: a checkpoint that main.py can read, with the state of the training."""
        save_checkpoint(self.path, model, **metadata, options=self.options, data=data, training=training)
        self._set_recovery_hint()

    def end(self) -> None:
        """Remove the state, once the run's results are written."""
        remove_file(self.path)

    def _set_recovery_hint(self):
        self.recovery_hint = f"the weights of the last good epoch are in {self.path}; main.py --model reads them"

    def _check(self, stored, path):
        stored, current = (json.loads(json.dumps(options)) for options in (_result_options(stored), self.options))
        names = [name for name in current | stored if name != "trigger_seed"]  # which is --seed's
        changed = [name for name in names if stored.get(name) != current.get(name)]
        if changed:
            listed = ", ".join(f"--{name} {stored.get(name)} (not {current.get(name)})" for name in changed)
            raise UserError(f"{path} belongs to a run with {listed}; use those, or start anew without --resume")


def finished_run(folder: str, options: dict, model_path: str) -> dict | None:
    """Read metrics.json of a finished run of main.py; a run writes it last.

    Args:
        options: as used, after what the checkpoint states has replaced the defaults; a num_class of None is not
            compared, because a run takes it from the data.

    Returns:
        its content, or None if there is none, if its options differ, or if its model was another file.
    """
    try:
        with open(os.path.join(folder, METRICS_FILE)) as file:
            metrics = json.load(file)
        is_same_model = metrics["model_sha256"] == sha256_of(model_path) and isinstance(metrics["before"], dict)
        ignored = {"model": None} if options.get("num_class") else {"model": None, "num_class": None}
        expected = json.loads(json.dumps(_result_options(options))) | ignored  # tuples become lists, as in the file
        return metrics if is_same_model and expected == _result_options(metrics["config"]) | ignored else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def resume_command() -> str:
    """The command line that resumes this run."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")  # each machine has a torchrun of its own
    runner = ["python"] if count == "1" else ["torchrun", f"--nproc_per_node={count}"]
    return shlex.join([*runner, *(word for word in sys.argv if word != "--resume"), "--resume"])


def _is_same(stored, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether what a file states as a dict of tensors is this one."""
    if not isinstance(stored, dict) or stored.keys() != tensors.keys():
        return False
    return all(isinstance(stored[name], torch.Tensor) and torch.equal(stored[name], tensors[name]) for name in tensors)


def _result_options(options: dict) -> dict:
    """The options that affect the results; with --dataset folder, --data_root selects the images."""
    ignored = NON_RESULT_OPTIONS - {"data_root"} if options.get("dataset") == "folder" else NON_RESULT_OPTIONS
    return {name: value for name, value in options.items() if name not in ignored}
