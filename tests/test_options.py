"""Options are checked before anything compiles, and errors name the nearest valid one."""

import pytest

from torch_fuse.options import OptionError, Options, mode_options, parse_options
from torch_fuse.rewrite.registry import patterns


def parse(**options):
    return parse_options(options, patterns())


def test_no_options_are_the_defaults():
    assert parse_options(None, patterns()) == Options()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kernel": "auto"}, ["'kernel'", "'kernels'"]),
        ({"kernels": "refrence"}, ["'refrence'", "'reference'", "auto"]),
        ({"verify": True}, ["True", "first_call"]),
        ({"disable": ["causal_masc"]}, ["'causal_masc'", "'causal_mask'"]),
        ({"only": 3}, ["only", "3"]),
        ({"lossy": ["atention"]}, ["'atention'", "allowed: attention", "'attention'"]),
        ({"fuel": -1}, ["fuel", "-1", ">= 0"]),
        ({"fuel": True}, ["fuel", "True"]),
        ({"unmeasured": 1}, ["unmeasured", "1", "True"]),
        ({"on_miss": "raise"}, ["'raise'", "error"]),
        ({"inductor": {"max_autotun": True}}, ["'max_autotun'", "'max_autotune'"]),
        ({"inductor": 1}, ["inductor", "1"]),
    ],
)
def test_a_wrong_option_is_refused_with_what_is_allowed(options, named):
    with pytest.raises(OptionError) as error:
        parse(**options)
    for word in named:
        assert word in str(error.value)


def test_right_options_are_kept():
    found = parse(disable="causal_mask", kernels="reference", fuel=2, inductor={"max-autotune": True})
    assert (found.disable, found.kernels, found.fuel) == (("causal_mask",), "reference", 2)
    assert found.inductor == {"max_autotune": True}


def test_modes_are_inductors():
    assert mode_options(None) == {}
    assert mode_options("reduce-overhead")["triton.cudagraphs"] is True
    with pytest.raises(OptionError, match="reduce-overhead"):
        mode_options("reduce-overhed")
