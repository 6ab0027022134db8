"""Runs of main.py that fail or are interrupted: what ends, what goes on, what is left."""

import os
import shutil

import pytest
from conftest import CPU, MODEL, ROOT

import config
import main
from utils.distributed import ONE_PROCESS, Processes
from utils.errors import RunError, UserError
from utils.progress import Stopwatch


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """Compare ft and nad, whose runs raise what `errors` has for them; returns the runs in the order they began."""

    def run_all(errors, processes=ONE_PROCESS, order=("ft", "nad")):
        words = ["--dataset", "shapes", "--defense", "ft", "nad", "--model", MODEL, "--log_root", str(tmp_path)]
        opt, explicit = config.parse("main.py", words)
        begun, run_all.loaded = [], []
        run_all.begun = begun

        def run(options, explicit, name):
            begun.append(options.defense)
            if options.defense in errors:
                raise errors[options.defense]

        monkeypatch.setattr(main, "run", run)
        monkeypatch.setattr(main, "load_images", lambda _, split: run_all.loaded.append(split))
        monkeypatch.setattr(
            main, "deal_out", lambda _, runs, count: sorted(runs, key=lambda run: order.index(runs[run][1].defense))
        )
        for name in ("comparison_row", "write_comparison", "comparison_text"):
            monkeypatch.setattr(main, name, lambda *_: "")
        main.compare(opt, explicit, processes)
        return begun

    return run_all


def test_an_unexpected_error_of_one_run_does_not_end_a_comparison(compare, capsys):
    errors = {"ft": RuntimeError("derivative is not implemented")}
    with pytest.raises(RunError, match="1 of 2 runs failed; the first: .*RuntimeError: derivative is not implemented"):
        compare(errors)
    assert "Traceback" in capsys.readouterr().err
    assert compare({}) == ["ft", "nad"]


def test_a_comparison_goes_on_after_a_run_with_bad_input_unless_all_have_it(compare):
    error = UserError("another size")
    with pytest.raises(RunError, match="1 of 2 runs failed; the first: .*another size"):
        compare({"ft": error})
    assert compare.begun == ["ft", "nad"]
    with pytest.raises(UserError, match="2 of 2 runs failed; the first: .*another size"):
        compare({"ft": error, "nad": RunError("no pattern")})


def test_a_default_reference_that_does_not_fit_is_left_out():
    opt, _ = config.parse("main.py", ["--retune", "5"])
    assert main.load_reference(opt, 11, (32, 32), CPU) is None
    assert main.load_reference(opt, 10, (32, 32), CPU) is not None
    opt.retune_reference = str(ROOT / "weight" / "CIFAR10" / "WRN-16-1-clean.pth.tar")
    with pytest.raises(UserError, match="has 10 classes, but 11 are needed; pass another --retune_reference"):
        main.load_reference(opt, 11, (32, 32), CPU)


def test_a_retuning_attack_that_diverges_does_not_end_the_run(monkeypatch, capsys):
    def diverges(*_):
        raise RunError("loss or weights no longer finite in epoch 1")

    monkeypatch.setattr(main, "retuned_metrics", diverges)
    assert main.measure_retuned(None, None, {5: []}, None, None, None) == {}
    assert "the re-tuning attack failed" in capsys.readouterr().out


@pytest.mark.parametrize("error", [UserError("another size"), RunError("no pattern")])
def test_a_failure_of_one_process_of_torchrun_does_not_stop_the_others(compare, error):
    assert compare({"nad": error}, Processes(1, 2), order=("nad", "ft")) == ["nad", "ft"]
    assert compare.loaded == ["train"]  # by one process at a time, since the first may download it
    with pytest.raises(RunError, match="1 of 2 runs failed"):  # the main process says so
        compare({"nad": error}, Processes(0, 2), order=("nad", "ft"))


def test_a_second_comparison_says_that_it_replaces_the_tables_of_the_first(compare, tmp_path, capsys):
    compare({})
    assert "holds an earlier run" not in capsys.readouterr().out
    os.makedirs(tmp_path / "shapes-comparison")
    (tmp_path / "shapes-comparison" / "comparison.csv").touch()
    compare({})
    assert f"{tmp_path}/shapes-comparison holds an earlier run, which this one replaces" in capsys.readouterr().out


def test_a_run_that_is_interrupted_before_its_report_leaves_no_weights(run_with, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "get_retuning_batches", lambda *_: {5: []})
    monkeypatch.setattr(main, "measure_retuned", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with("--retune", "5", "--print_freq", "0")
    assert not list(tmp_path.rglob("*.tar"))


def test_tensorboard_shows_the_history_of_the_run_alone(run_with, monkeypatch):
    logged, history = [], [{"epoch": 1, "lr": 0.1, "loss": 2.0, "seconds": 3.0, "acc": 50.0}]
    monkeypatch.setattr(main, "open_tensorboard", lambda folder: lambda *point: logged.append(point))
    run_with("--tensorboard", history=history)
    (before, first), after = logged
    assert (first, set(before)) == (0, {"acc", "acc_published", "asr", "ra"})
    assert after == ({"lr": 0.1, "loss": 2.0, "seconds": 3.0, "acc": 50.0}, 1)


def test_a_comparison_does_not_replace_a_model_that_it_still_has_to_read(tmp_path, monkeypatch):
    folder = tmp_path / "weight" / "table"
    folder.mkdir(parents=True)
    for path in (tmp_path / "v.tar", folder / "v-ft.tar"):
        shutil.copy(MODEL, path)
    words = ["--dataset", "shapes", "--name", "table", "--checkpoint_root", tmp_path / "weight", "--log_root", tmp_path]
    words += ["--defense", "ft", "fst", "--model", tmp_path / "v.tar", folder / "v-ft.tar"]
    monkeypatch.setattr(main, "run", None)
    with pytest.raises(UserError, match=r"would replace the model .*v-ft\.tar"):
        main.compare(*config.parse("main.py", [str(word) for word in words]), ONE_PROCESS)


def test_weights_of_an_earlier_run_are_not_replaced_in_silence(tmp_path, capsys):
    opt, _ = config.parse("main.py", ["--checkpoint_root", str(tmp_path), "--log_root", str(tmp_path / "results")])
    opt.model = str(tmp_path / "victim.tar")
    (tmp_path / "mine.tar").touch()
    main.check_output(opt, "mine")
    assert "mine.tar is replaced" in capsys.readouterr().out
    main.check_output(opt, "yours")
    assert capsys.readouterr().out == ""
    for opt.model, opt.retune_reference in ((str(tmp_path / "mine.tar"), None), ("x", str(tmp_path / "mine.tar"))):
        with pytest.raises(UserError, match="would replace the model"):
            main.check_output(opt, "mine")


def test_a_stage_that_fails_has_its_time_too():
    clock = Stopwatch()
    with pytest.raises(ZeroDivisionError), clock("inversion"):
        _ = 1 / 0
    assert clock.seconds.keys() == {"inversion"}
