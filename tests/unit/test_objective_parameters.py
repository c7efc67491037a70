"""Schemas of the objectives: defaults, aliases, bounds, and messages that say what, where, the rule and the way out."""

import subprocess
import sys
from typing import Annotated, get_args

import pytest
from pydantic import BaseModel, BeforeValidator, ValidationError

from caldpo_ray.errors import InputError
from caldpo_ray.settings.objective_parameters import (
    SCHEMAS,
    BuiltInParameters,
    ObjectiveParameters,
    parse_objective,
)

REQUIRED = {"f_dpo": {"divergence": "js"}}


def plain(name: str, **parameters: object) -> dict[str, object]:
    return dict(parse_objective({"name": name, **parameters}))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("cal_dpo", {}, {"beta": 0.001, "calibration_weight": 1.0}),
        ("cal_ipo", {}, {"beta": 0.001, "calibration_weight": 1.0}),
        ("cal_slic", {}, {"beta": 0.001, "calibration_weight": 1.0}),
        ("dpo", {}, {"beta": 0.1, "label_smoothing": 0.0}),
        ("ipo", {}, {"beta": 0.1, "length_normalize": False}),
        ("slic", {}, {"beta": 0.1}),
        ("f_dpo", {"divergence": "js"}, {"beta": 0.1, "divergence": "js", "alpha": None}),
        ("f_dpo", {"divergence": "alpha"}, {"beta": 0.1, "divergence": "alpha", "alpha": 0.5}),
        ("cpo", {}, {"beta": 0.1, "nll_weight": 1.0}),
        ("dpop", {}, {"beta": 0.1, "penalty": 50.0}),
        ("dpo_nll", {}, {"beta": 0.1, "nll_weight": 1.0}),
        ("sft", {}, {}),
    ],
)
def test_defaults_are_those_of_the_specification(name, given, expected):
    assert plain(name, **given) == {"name": name, **expected}


def test_every_schema_is_registered_under_its_name():
    assert set(SCHEMAS.values()) == set(get_args(BuiltInParameters))
    for name, schema in SCHEMAS.items():
        assert parse_objective({"name": name, **REQUIRED.get(name, {})}).name == name
        assert schema.__doc__ and all(field.description for key, field in schema.model_fields.items() if key != "name")


@pytest.mark.parametrize(
    ("alias", "name"), [("sigmoid", "dpo"), ("hinge", "slic"), ("caldpo", "cal_dpo"), ("dpnll", "dpo_nll")]
)
def test_names_of_other_projects(alias, name):
    assert plain(alias, beta=0.3) == plain(name, beta=0.3)


def test_cdpo_is_dpo_with_explicit_smoothing():
    assert plain("cdpo", label_smoothing=0.1) == plain("dpo", label_smoothing=0.1)
    for given in ({}, {"label_smoothing": 0.0}):
        with pytest.raises(InputError, match=r"cdpo: label_smoothing is required and must be greater than 0"):
            plain("cdpo", **given)


@pytest.mark.parametrize("alias", ["cal_weight", "caldpo_lambda"])
def test_calibration_weight_has_two_other_spellings(alias):
    assert plain("cal_dpo", **{alias: 0.5}) == plain("cal_dpo", calibration_weight=0.5)
    with pytest.raises(InputError, match="given twice"):
        plain("cal_dpo", **{alias: 0.5, "calibration_weight": 0.5})
    with pytest.raises(InputError, match=rf"dpo: {alias} = 0\.5: not a parameter of this objective, only of cal_dpo"):
        plain("dpo", **{alias: 0.5})


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        *[("dpo", {"beta": beta}, f"dpo: beta = {beta}: must be greater than 0") for beta in (0, -1)],
        ("dpo", {"beta": float("inf")}, "dpo: beta = inf: must be a finite number"),
        ("dpo", {"beta": float("nan")}, "dpo: beta = nan: must be a finite number"),
        ("dpo", {"beta": "strong"}, "dpo: beta = 'strong': must be a valid number"),
        ("dpo", {"beta": None}, "dpo: beta = None: must be a valid number"),
        ("dpo", {"label_smoothing": 0.5}, "dpo: label_smoothing = 0.5: must be less than 0.5"),
        ("dpo", {"label_smoothing": -0.1}, "dpo: label_smoothing = -0.1: must be greater than or equal to 0"),
        ("cal_dpo", {"calibration_weight": -1}, "calibration_weight = -1: must be greater than or equal to 0"),
        ("cal_dpo", {"label_smoothing": 0.1}, "label_smoothing = 0.1: not a parameter of this objective, only of dpo"),
        ("dpo", {"betta": 0.1}, "dpo: betta = 0.1: unknown parameter, did you mean beta? (its parameters are beta, l"),
        ("dpo", {"x": 1}, "dpo: x = 1: unknown parameter (its parameters are beta, label_smoothing)"),
        ("sft", {"beta": 0.1}, "(it has no parameters)"),
        ("ipo", {"length_normalize": "maybe"}, "ipo: length_normalize = 'maybe': must be a valid boolean"),
        ("f_dpo", {}, "f_dpo: divergence is required and not given (its parameters are beta, divergence, alpha)"),
        ("f_dpo", {"divergence": "kl"}, "divergence = 'kl': must be 'reverse_kl', 'forward_kl', 'js' or 'alpha'"),
        (
            "f_dpo",
            {"divergence": "js", "alpha": 0.5},
            "alpha = 0.5: only divergence alpha uses it, and",
        ),
        ("f_dpo", {"divergence": "alpha", "alpha": 0}, "alpha = 0: must be greater than 0"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.5}, "alpha = 1.5: must be less than or equal to 1"),
        ("dpop", {"penalty": -1}, "dpop: penalty = -1: must be greater than or equal to 0"),
        (
            "cal-dpo",
            {},
            "unknown objective 'cal-dpo', did you mean cal_dpo?; name is one of cal_dpo, ",
        ),
        ("my losses:f", {}, "name = 'my losses:f': must be package.module:function"),
        (None, {}, "no objective is named; name is one of cal_dpo"),
        (["dpo"], {}, "unknown objective ['dpo']"),
    ],
)
def test_mistakes_are_explained(name, given, says):
    with pytest.raises(InputError) as caught:
        plain(name, **given)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(InputError, match=r"beta = -1: .*; label_smoothing = 0\.7: .*; gamma = 2: unknown parameter"):
        plain("dpo", beta=-1, label_smoothing=0.7, gamma=2)


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("rpo_alpha", "nll_weight"),
        ("nll_loss_coef", "nll_weight"),
        ("pref_ftx", "nll_weight"),
        ("sft_loss_weight", "nll_weight"),
        ("loss_weights", "dpo_nll"),
        ("simpo_gamma", "beta times a margin"),
        ("f_alpha_divergence_coef", "1 - alpha"),
    ],
)
@pytest.mark.parametrize("name", ["dpo", "dpo_nll", "cal_dpo"])
def test_look_alikes_with_another_reduction_are_refused(name, key, instead):
    with pytest.raises(InputError, match=rf"{name}: {key} = 1\.0: not accepted: .*{instead}"):
        plain(name, **{key: 1.0})


def test_not_a_mapping():
    with pytest.raises(InputError, match=r"'dpo': must be a mapping with a name, for example \{name: cal_dpo\}"):
        parse_objective("dpo")  # type: ignore[arg-type]


class Section(BaseModel):
    objective: Annotated[ObjectiveParameters, BeforeValidator(parse_objective)]


@pytest.mark.parametrize(
    "given",
    [
        {"name": "caldpo", "beta": "1e-3", "cal_weight": 0.5},
        {"name": "f_dpo", "divergence": "js"},
        {"name": "f_dpo", "divergence": "alpha"},
        {"name": "sft"},
        {"name": "my.losses:tilted", "beta": 0.2, "kind": "a", "needs_reference": False},
    ],
)
def test_a_resolved_section_reads_back_to_itself(given):
    section = Section(objective=given)
    again = Section.model_validate_json(section.model_dump_json())
    assert again == section
    assert again.objective == parse_objective(section.objective)
    assert type(again.objective) is type(parse_objective(given))


def test_a_section_reports_the_same_words():
    with pytest.raises(ValidationError, match=r"dpo: beta = 0: must be greater than 0"):
        Section(objective={"name": "dpo", "beta": 0})


def test_parameters_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        parse_objective({"name": "dpo"}).beta = 1.0  # type: ignore[misc,union-attr]


def test_custom_objective_keeps_its_own_parameters():
    parsed = parse_objective({"name": "my.losses:tilted", "beta": -3, "rpo_alpha": 1.0})
    assert parsed.model_extra == {"beta": -3, "rpo_alpha": 1.0}
    assert (parsed.needs_reference, parsed.min_responses, parsed.calibration_target) == (True, 2, None)
    with pytest.raises(InputError, match=r"min_responses = 0: must be greater than or equal to 1"):
        parse_objective({"name": "my.losses:tilted", "min_responses": 0})


def test_formula_shows_the_values_in_force():
    formulas = {
        "-log σ(Δ) + 0.5·[(h_w - 5)² + (h_l + 5)²]": {"name": "cal_dpo", "beta": 0.1, "calibration_weight": 0.5},
        "(Δ - 5)² + 1·[(h_w - 5)² + (h_l + 5)²]": {"name": "cal_ipo", "beta": 0.1},
        "max(0, 1 - 0.1·Δ) + 1·[(h_w - 5)² + (h_l + 5)²]": {"name": "cal_slic", "beta": 0.1},
        "-log σ(0.2·Δ)": {"name": "dpo", "beta": 0.2},
        "-0.9·log σ(0.1·Δ) - 0.1·log σ(-0.1·Δ)": {"name": "dpo", "label_smoothing": 0.1},
        "(Δ - 5)²": {"name": "ipo"},
        "(h_w/n_w - h_l/n_l - 2.5)²": {"name": "ipo", "beta": 0.2, "length_normalize": True},
        "max(0, 1 - 0.1·Δ)": {"name": "slic"},
        "-log σ(0.1·[g(h_w) - g(h_l)]), g(h) = (1 - exp(-0.3·h))/0.3": {
            "name": "f_dpo",
            "divergence": "alpha",
            "alpha": 0.3,
        },
        "-log σ(0.1·[g(h_w) - g(h_l)]), g(h) = -exp(-h)": {"name": "f_dpo", "divergence": "forward_kl"},
        "-log σ(0.1·(p_w - p_l)) - 2·p_w/n_w": {"name": "cpo", "nll_weight": 2},
        "-log σ(0.1·[Δ - 5·max(0, -h_w)])": {"name": "dpop", "penalty": 5},
        "-log σ(0.1·Δ) - 1·p_w/n_w": {"name": "dpo_nll"},
        "-p_w/n_w": {"name": "sft"},
    }
    for formula, given in formulas.items():
        assert parse_objective(given).formula == formula


def test_importing_the_schemas_loads_neither_torch_nor_ray():
    code = "import sys, caldpo_ray.settings.objective_parameters; print({'torch', 'ray', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
