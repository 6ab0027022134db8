"""The options: their defaults, the ones that are refused, and the errors."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import config
from defenses import DEFENSE_FUNCTIONS
from utils import cli
from utils.device import pick_device, pick_precision
from utils.errors import RunError, UserError, run_script

OUT_OF_MEMORY = "out of memory; try a lower --batch_size, smaller images, or another --device"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--dataset", "cifar"], "invalid choice"),
        (["--trigger_type", "gridtriger"], "invalid choice: 'gridtriger'; did you mean gridTrigger?"),
        (["--temprature", "1"], "unrecognized arguments: --temprature 1; did you mean --temperature?"),
        (["--no_such_option"], "unrecognized arguments"),
        (["--seed", "9" * 20], "is not a number of 64 bits"),
        (["--epochs", "0"], "0 is not 1 or more"),
        (["--ratio", "0"], "0 is not above 0 and up to 1"),
        (["--ratio", "1.5"], "1.5 is not above 0 and up to 1"),
        (["--lr", "nan"], "nan is not above 0"),
        (["--ema", "1"], "1 is not from 0 to below 1"),
        (["--trig_w", "2"], "--trig_w applies only with --trigger_type squareTrigger or trojanTrigger"),
        (["--opacity", "0.5"], "--opacity applies only with --trigger_type randomPixelTrigger or blendTrigger"),
        (["--image_size", "64"], "--image_size applies only with --dataset GTSRB or folder"),
        (
            ["--target_type", "all2all", "--target_label", "3"],
            "--target_label applies only with --target_type all2one or cleanLabel",
        ),
        (
            ["--positive", "backdoored", "--finetune_lr", "0.1"],
            "--finetune_lr applies only with --positive auto or finetuned",
        ),
        (
            ["--tensorboard", "--print_freq", "0"],
            "--tensorboard applies only with a training, and --print_freq from 1 to --epochs",
        ),
        (["--defense", "none", "--tensorboard"], "--tensorboard applies only with a training"),
        (["--defense", "none", "--epochs", "3"], "--epochs applies only with --defense mcl or ft or"),
        (["--defense", "ft", "--temperature", "1"], "--temperature applies only with --defense mcl"),
        (["--defense", "fst", "--target", "3"], "--target applies only with --defense mcl or nc"),
        (["--defense", "ibau", "--momentum", "0"], "--momentum applies only with --defense mcl or ft or nad or nc"),
        (["--contrast", "none", "--align_weight", "0"], "--contrast applies only with --align_weight above 0"),
        (["--contrast", "none", "--temperature", "1"], "--temperature applies only with --contrast others or all"),
        (["--target", "3", "--force"], "--force applies only with --target auto"),
        (["--target", "-1"], "-1 is not auto, any, or a label"),
        (["--defense", "nc", "ft", "--rho", "1"], "--rho applies only with --defense ftsam or pam"),
        (["--resume"], "--resume applies only with several defenses, models or --seeds"),
        (["--seed", "1", "--seeds", "2"], "--seed applies only with one seed, without --seeds"),
        (
            ["--defense", "none", "--ratio", "0.1"],
            "--ratio applies only with a --defense other than none, without --clean",
        ),
        (
            ["--clean", "100", "--ratio", "0.1"],
            "--ratio applies only with a --defense other than none, without --clean",
        ),
    ],
)
def test_an_option_that_does_not_apply_is_one_line_and_exit_code_2(words, error, capsys):
    with pytest.raises(SystemExit) as ended:
        run_script(lambda: config.parse("main.py", words))
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert error in message
    assert message.startswith("error: ")
    assert message.endswith(" (see python main.py --help)\n")
    assert message.count("\n") == 1


def test_explicit_options_are_distinguished_from_defaults():
    options, explicit = config.parse("main.py", ["--seed", "1", "--dataset", "shapes"])
    assert explicit == {"seed", "dataset"}
    assert options.seed == 1


def test_a_trigger_sets_its_label_mode_poison_rate_and_strength():
    options, explicit = config.parse("train_badnet.py", ["--trigger_type", "signalTrigger"])
    assert (options.target_type, options.inject_portion, options.delta) == ("cleanLabel", 0.5, 40)
    assert explicit == {"trigger_type"}
    options, _ = config.parse("train_badnet.py", ["--trigger_type", "signalTrigger", "--delta", "9"])
    assert options.delta == 9
    assert options.opacity is None
    assert config.parse("train_badnet.py", ["--target_type", "all2all"])[0].inject_portion == 0.2


def test_a_clean_model_has_no_options_of_poisoned_images():
    words = ["--trigger_type", "wanetTrigger", "--inject_portion", "0"]
    assert config.parse("train_badnet.py", words)[0].inject_portion == 0
    with pytest.raises(UserError, match="--noise_ratio applies only with --inject_portion above 0"):
        config.parse("train_badnet.py", [*words, "--noise_ratio", "1"])
    words = ["--inject_portion", "0", "--surrogate", "x", "--trigger_type"]
    assert config.parse("train_badnet.py", [*words, "trojanTrigger"])[0].surrogate == "x"
    with pytest.raises(UserError, match="--surrogate applies only with --inject_portion above 0"):
        config.parse("train_badnet.py", [*words, "clTrigger"])


def test_adamw_has_no_momentum():
    assert config.parse("train_badnet.py", ["--optimizer", "adamw"])[0].optimizer == "adamw"
    assert config.parse("train_badnet.py", ["--momentum", "0.5"])[0].momentum == 0.5
    with pytest.raises(UserError, match="--momentum applies only with --optimizer sgd"):
        config.parse("train_badnet.py", ["--optimizer", "adamw", "--momentum", "0.5"])


@pytest.mark.parametrize("name", ["main.py", "train_badnet.py"])
def test_help_opens_with_the_purpose_and_examples(script, name):
    lines = script(name, "--help").stdout.splitlines()
    assert lines[0] == (ROOT / name).read_text().splitlines()[0].strip('"')
    options = next(i for i, line in enumerate(lines) if line.startswith("options:"))
    assert sum(f"python {name}" in line for line in lines[:options]) >= 3


def test_each_script_has_only_its_own_options():
    attack, defense = (vars(config.get_arguments(script).parse_args([])) for script in ("train_badnet.py", "main.py"))
    assert "inject_portion" in attack
    assert "inject_portion" not in defense
    assert "temperature" in defense
    assert "temperature" not in attack


def test_the_parser_knows_every_option_with_a_condition_and_every_defense():
    known = vars(config.get_arguments("main.py").parse_args([]))
    known |= vars(config.get_arguments("train_badnet.py").parse_args([]))
    assert set(cli.OPTION_CONDITIONS) <= set(known)
    assert set(config.DEFENSES) == set(DEFENSE_FUNCTIONS)


def test_a_defense_sets_its_recipe():
    options, _ = config.parse("main.py", ["--defense", "ftsam", "--rho", "1"])
    assert (options.epochs, options.batch_size, options.rho) == (100, 256, 1)
    assert options.temperature is options.target is options.alpha is None
    assert config.parse("main.py", [])[0].target == "auto"


def test_a_comparison_gives_each_defense_its_recipe_and_the_explicit_options():
    options, _ = config.parse("main.py", ["--defense", "all", "--lr", "0.5", "--temperature", "1", "--target", "3"])
    assert cli.is_comparison(options)
    mcl, ft = (config.single_run_options(options, defense=defense) for defense in ("mcl", "ft"))
    epochs = config.DEFENSES["mcl"]["epochs"]
    assert (mcl.epochs, mcl.lr, mcl.temperature, mcl.target, mcl.force) == (epochs, 0.5, 1, 3, False)
    assert (ft.epochs, ft.lr, ft.temperature, ft.target) == (20, 0.5, None, None)
    assert cli.is_comparison(config.parse("main.py", ["--model", "a", "b"])[0])
    assert not cli.is_comparison(config.parse("main.py", ["--model", "a"])[0])


def test_several_defenses_are_compared_each_once():
    options, _ = config.parse("main.py", ["--defense", "nc", "mcl", "nc", "--temperature", "1"])
    assert (options.defense, cli.is_comparison(options)) == (["nc", "mcl"], True)
    assert config.parse("main.py", ["--defense", "ft", "all"])[0].defense == list(config.DEFENSES)
    assert config.parse("main.py", ["--defense", "nc", "nc"])[0].defense == "nc"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("two\nlines"), 2, "two lines"),
        (RunError("no"), 1, "no"),
        (KeyboardInterrupt(), 130, "stopped; go on"),
        (MemoryError(), 1, OUT_OF_MEMORY),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, OUT_OF_MEMORY),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, message, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_script(main, "go on")
    assert (ended.value.code, capsys.readouterr().err) == (code, f"error: {message}\n")


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_run():
    command = "from utils.errors import run_script; run_script(lambda: print('caf\\udce9', '\\u72d7'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    output = subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, env=environment, text=True)
    assert output == "caf\\udce9 \\u72d7\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_script(lambda: (_ for _ in ()).throw(RuntimeError("shapes differ")), "")


def test_a_cpu_flushes_denormal_numbers_to_zero():
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor has no such setting")
    tiny = torch.tensor([1e-30])
    assert (tiny * 1e-10).item() > 0
    try:
        assert pick_device("cpu") == torch.device("cpu")
        assert (tiny * 1e-10).item() == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("computes, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_chooses_bf16_if_the_processor_computes_in_it(monkeypatch, computes, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: computes)
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == expected
    assert (pick_precision("fp32", cpu), pick_precision("bf16", cpu)) == ("fp32", "bf16")
