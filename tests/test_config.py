"""The options: what is refused, and how."""

import pytest

import config


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--dataset", "cifar"], "invalid choice"),
        (["--no_such_option"], "unrecognized arguments"),
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
        (["--positive", "backdoored", "--finetune_lr", "0.1"], "--finetune_lr applies only with --positive finetuned"),
        (["--tensorboard", "--print_freq", "0"], "--tensorboard applies only with --print_freq from 1 to --epochs"),
        (["--defense", "none", "--tensorboard"], "--tensorboard does not apply with --defense none"),
        (["--defense", "none", "--epochs", "3"], "--epochs does not apply with --defense none"),
    ],
)
def test_what_does_not_apply_is_refused_in_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        config.parse("main.py", words)
    message = capsys.readouterr().err
    assert ended.value.code == 2
    assert told in message
    assert message.startswith("error: ")
    assert message.count("\n") == 1


def test_given_options_are_told_from_defaults():
    options, given = config.parse("main.py", ["--seed", "1", "--dataset", "shapes"])
    assert given == {"seed", "dataset"}
    assert options.seed == 1


def test_a_trigger_brings_its_label_mode_rate_and_strength():
    options, given = config.parse("train_badnet.py", ["--trigger_type", "signalTrigger"])
    assert (options.target_type, options.inject_portion, options.delta) == ("cleanLabel", 0.5, 40)
    assert given == {"trigger_type"}
    options, _ = config.parse("train_badnet.py", ["--trigger_type", "signalTrigger", "--delta", "9"])
    assert options.delta == 9
    assert options.opacity is None
    assert config.parse("train_badnet.py", ["--target_type", "all2all"])[0].inject_portion == 0.2


def test_what_poisons_nothing_has_no_options_of_poisoning(capsys):
    words = ["--trigger_type", "wanetTrigger", "--inject_portion", "0"]
    assert config.parse("train_badnet.py", words)[0].inject_portion == 0
    with pytest.raises(SystemExit):
        config.parse("train_badnet.py", [*words, "--noise_ratio", "1"])
    assert "--noise_ratio does not apply with --inject_portion 0" in capsys.readouterr().err


def test_each_script_has_only_its_own_options():
    attack, defense = (vars(config.get_arguments(script).parse_args([])) for script in ("train_badnet.py", "main.py"))
    assert "inject_portion" in attack
    assert "inject_portion" not in defense
    assert "temperature" in defense
    assert "temperature" not in attack


def test_the_options_of_the_defense_are_all_known_to_the_parser():
    assert set(config.DEFENDING.split()) | set(config.APPLIES) <= set(
        vars(config.get_arguments("main.py").parse_args([]))
    )
