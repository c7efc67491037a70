"""Tier 1 objectives against golden values, closed forms and identities; rows with k responses, padding and ties."""

import importlib.util
import inspect
import itertools
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from caldpo_ray.errors import InputError
from caldpo_ray.objectives import get_objective
from caldpo_ray.objectives.registry import FUNCTIONS, vector_names
from caldpo_ray.settings.objective_parameters import SCHEMAS, parse_objective
from caldpo_ray.settings.user_code import require_objective

HERE = Path(__file__).parent
GOLDEN_FILE = HERE.parent / "golden" / "objectives.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text(encoding="utf-8"))
SHARED = HERE.parents[1] / ".." / "shared" / "golden_objectives.py"
PAIR_KEYS = [("policy_chosen", "policy_rejected"), ("reference_chosen", "reference_rejected")]
LENGTH_KEYS = ("chosen_length", "rejected_length")

# One setting per objective with every term and branch switched on; beta large enough for no term to hide another.
SETTINGS: dict[str, dict[str, object]] = {
    "cal_dpo": {"beta": 0.2, "calibration_weight": 0.7},
    "cal_ipo": {"beta": 0.2, "calibration_weight": 0.7},
    "cal_slic": {"beta": 0.2, "calibration_weight": 0.7},
    "dpo": {"beta": 0.2, "label_smoothing": 0.1},
    "ipo": {"beta": 0.2, "length_normalize": True},
    "slic": {"beta": 0.02},
    "f_dpo": {"beta": 0.2, "divergence": "alpha", "alpha": 0.3},
    "cpo": {"beta": 0.2, "nll_weight": 0.7},
    "dpop": {"beta": 0.2, "penalty": 3.0},
    "dpo_nll": {"beta": 0.2, "nll_weight": 0.7},
    "sft": {},
}
PAIRED = [name for name in SETTINGS if name != "sft"]
POLICY = torch.tensor([[-42.0, -57.5, -52.0, -61.0], [-33.9, -42.9, -40.0, -37.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[-45.0, -55.0, -51.5, -60.0], [-33.2, -41.0, -40.6, -38.5]], dtype=torch.float64)
LENGTHS = torch.tensor([[20, 25, 20, 31], [17, 23, 16, 19]])


def pair(p_w: float, p_l: float, r_w: float, r_l: float, n_w: int = 20, n_l: int = 25) -> tuple[Tensor, Tensor, Tensor]:
    policy = torch.tensor([[p_w, p_l]], dtype=torch.float64)
    return policy, torch.tensor([[r_w, r_l]], dtype=torch.float64), torch.tensor([[n_w, n_l]])


VECTORS = {"A": pair(-42.0, -57.5, -45.0, -55.0), "B": pair(-33.9, -42.9, -33.2, -41.0, 17, 23)}


def losses_and_gradient(objective, policy, reference, lengths, **columns):
    policy = policy.clone().requires_grad_()
    losses = objective(policy, reference, lengths, **columns).losses
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient


def assert_same(one, other, tolerance=1e-12):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------ golden values
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_value_and_gradient(case, dtype):
    expected, inputs = GOLDEN[case], dict(GOLDEN[case]["inputs"])
    policy, reference = (torch.tensor([[inputs.pop(key) for key in keys]], dtype=dtype) for keys in PAIR_KEYS)
    lengths = torch.tensor([[inputs.pop(key) for key in LENGTH_KEYS]])
    value, gradient = losses_and_gradient(get_objective(expected["objective"], **inputs), policy, reference, lengths)
    slopes = [expected["grad"].get(key, 0.0) for key in PAIR_KEYS[0]]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert value.dtype == dtype
    assert value.tolist() == pytest.approx([expected["value"]], rel=tolerance, abs=tolerance)
    assert gradient[0].tolist() == pytest.approx(slopes, rel=tolerance, abs=tolerance)


def test_golden_file_covers_every_pair_objective_and_agrees_with_its_source():
    assert {case["objective"] for case in GOLDEN.values()} == set(PAIRED)
    if not SHARED.exists():
        pytest.skip("../shared/golden_objectives.py is not beside this checkout")
    spec = importlib.util.spec_from_file_location("golden_objectives", SHARED)
    source = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source)
    source.identities()
    source.start_values()
    assert {name: case for name, case in source.golden().items() if case["tier"] == 1} == GOLDEN


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_equals_finite_differences(name):
    objective = get_objective(name, **SETTINGS[name])
    policy = POLICY.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: objective(p, REFERENCE, LENGTHS).losses, policy)


# ------------------------------------------------------------------------------------------------------- start values
@pytest.mark.parametrize("beta", [3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_start_values_of_calibrated_objectives(beta, weight):
    expected = {
        "cal_dpo": (math.log(2) + weight / (2 * beta**2), 0.5 + weight / beta),
        "cal_ipo": ((1 + 2 * weight) / (4 * beta**2), (1 + weight) / beta),
        "cal_slic": (1 + weight / (2 * beta**2), beta + weight / beta),
    }
    for name, (value, slope) in expected.items():
        objective = get_objective(name, beta=beta, calibration_weight=weight)
        loss, gradient = losses_and_gradient(objective, REFERENCE[:1, :2], REFERENCE[:1, :2], LENGTHS[:1, :2])
        assert loss.tolist() == pytest.approx([value], rel=1e-12)
        assert gradient[0].tolist() == pytest.approx([-slope, slope], rel=1e-12)
        assert objective.calibration_target == 0.5 / beta


@pytest.mark.parametrize(
    ("beta", "target", "full", "half", "slope"),
    [
        (3e-5, 16667, 5.556e8, 2.778e8, -33333.8),
        (1e-3, 500, 500001, 250001, -1000.5),
        (1e-1, 5, 50.6931, 25.6931, -10.5),
    ],
)
def test_start_values_printed_in_the_specification(beta, target, full, half, slope):
    objective = get_objective("cal_dpo", beta=beta)
    start = REFERENCE[:1, :2], REFERENCE[:1, :2], LENGTHS[:1, :2]
    loss, gradient = losses_and_gradient(objective, *start)
    assert objective.calibration_target == pytest.approx(target, rel=1e-4)
    assert loss.item() == pytest.approx(full, rel=1e-4)
    halved = get_objective("cal_dpo", beta=beta, calibration_weight=0.5)
    assert halved(*start).losses.item() == pytest.approx(half, rel=1e-4)
    assert gradient[0, 0].item() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("beta", [1e-3, 0.1, 1.0])
def test_start_values_of_the_other_objectives(beta):
    ln2, margin = math.log(2), 1 / (4 * beta**2)
    expected = [
        ("dpo", {"label_smoothing": 0.1}, ln2, -beta * 0.4, beta * 0.4),
        ("ipo", {}, margin, -1 / beta, 1 / beta),
        ("ipo", {"length_normalize": True}, margin, -1 / (20 * beta), 1 / (25 * beta)),
        ("slic", {}, 1.0, -beta, beta),
        ("dpop", {}, ln2, -beta / 2, beta / 2),
        *[
            ("f_dpo", {"divergence": kind}, ln2, -beta / share, beta / share)
            for kind, share in (("reverse_kl", 2), ("forward_kl", 2), ("alpha", 2), ("js", 4))
        ],
    ]
    for name, parameters, value, *slopes in expected:
        objective = get_objective(name, beta=beta, **parameters)
        loss, gradient = losses_and_gradient(objective, REFERENCE[:1, :2], REFERENCE[:1, :2], LENGTHS[:1, :2])
        assert loss.tolist() == pytest.approx([value], rel=1e-12)
        assert gradient[0].tolist() == pytest.approx(slopes, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- identities
@pytest.fixture(params=VECTORS)
def vector(request):
    return VECTORS[request.param]


def evaluate(vector, name, **parameters):
    return losses_and_gradient(get_objective(name, **parameters), *vector)


def combine(one, other, factor=1.0):
    return [a + factor * b for a, b in zip(one, other, strict=True)]


def calibration(vector, beta):
    """(h_w - 1/(2 beta))² + (h_l + 1/(2 beta))² and its gradient, written out again."""
    policy, reference, _ = vector
    distance = policy - reference + torch.tensor([-0.5, 0.5], dtype=torch.float64) / beta
    return distance.square().sum(dim=1), 2 * distance


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_calibrated_objectives_are_their_base_plus_calibration(vector, weight):
    extra = calibration(vector, 0.1)
    for name, base in {
        "cal_dpo": evaluate(vector, "dpo", beta=1.0),  # no beta inside its sigmoid
        "cal_ipo": evaluate(vector, "ipo", beta=0.1),
        "cal_slic": evaluate(vector, "slic", beta=0.1),
    }.items():
        assert_same(evaluate(vector, name, beta=0.1, calibration_weight=weight), combine(base, extra, weight))


def test_calibration_is_a_margin_loss_and_a_drift_penalty(vector):
    policy, reference, lengths = vector
    h_w, h_l = (policy - reference)[0]
    term = get_objective("cal_dpo", beta=0.1)(policy, reference, lengths).terms["calibration"]
    assert term.item() == pytest.approx((0.5 * (h_w - h_l - 10) ** 2 + 0.5 * (h_w + h_l) ** 2).item(), rel=1e-12)


def test_objectives_that_reduce_to_dpo(vector):
    dpo = evaluate(vector, "dpo", beta=0.1)
    assert_same(evaluate(vector, "f_dpo", beta=0.1, divergence="reverse_kl"), dpo)
    assert_same(evaluate(vector, "dpop", beta=0.1, penalty=0.0), dpo)
    assert_same(evaluate(vector, "dpo_nll", beta=0.1, nll_weight=0.0), dpo)
    assert_same(evaluate(vector, "f_dpo", beta=0.1, divergence="alpha", alpha=1e-7), dpo, tolerance=1e-6)
    policy, reference, lengths = vector
    free = policy, torch.zeros_like(reference), lengths
    assert_same(evaluate(vector, "cpo", beta=0.1, nll_weight=0.0), evaluate(free, "dpo", beta=0.1))


def test_dpop_is_dpo_while_the_chosen_response_gains():
    assert_same(evaluate(VECTORS["A"], "dpop", beta=0.1), evaluate(VECTORS["A"], "dpo", beta=0.1))
    assert evaluate(VECTORS["B"], "dpop", beta=0.1)[0] > evaluate(VECTORS["B"], "dpo", beta=0.1)[0]


def test_alpha_divergence_at_one_is_forward_kl(vector):
    forward = evaluate(vector, "f_dpo", beta=0.1, divergence="forward_kl")
    assert_same(evaluate(vector, "f_dpo", beta=0.1, divergence="alpha", alpha=1.0), forward)


def test_a_common_shift_changes_calibration_and_no_margin_loss(vector):
    policy, reference, lengths = vector
    moved = policy + 2, reference, lengths
    for name in ("dpo", "ipo", "slic"):
        assert_same(evaluate(vector, name, beta=0.1), evaluate(moved, name, beta=0.1))
    change = evaluate(moved, "cal_dpo", beta=0.1)[0] - evaluate(vector, "cal_dpo", beta=0.1)[0]
    assert change.item() == pytest.approx(4 * (policy - reference).sum().item() + 8, rel=1e-9)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_free_minimisers(weight):
    def gradient_at(name: str, h: float) -> Tensor:
        objective = get_objective(name, beta=0.1, calibration_weight=weight)
        return losses_and_gradient(objective, *pair(h, -h, 0.0, 0.0))[1]

    u = 5.0
    for _ in range(100):
        u = 5.0 + torch.sigmoid(torch.tensor(-2 * u, dtype=torch.float64)).item() / (2 * weight)
    assert gradient_at("cal_dpo", u).abs().max() < 1e-9
    assert gradient_at("cal_ipo", (1 + weight) / (2 + weight) * 5).abs().max() < 1e-12
    assert evaluate(pair(5.0, -5.0, 0.0, 0.0), "cal_slic", beta=0.1)[0].item() == 0.0


# ------------------------------------------------------------------------------------- rows of k responses, padding
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_padded_pair_in_a_wider_batch_equals_the_plain_pair(name, padding):
    objective = get_objective(name, **SETTINGS[name])
    plain = losses_and_gradient(objective, POLICY[:1, :2], REFERENCE[:1, :2], LENGTHS[:1, :2])
    policy, reference, lengths = POLICY.clone(), REFERENCE.clone(), LENGTHS.clone()
    lengths[0, 2:], policy[0, 2:], reference[0, 2:] = 0, 0.0, padding
    loss, gradient = losses_and_gradient(objective, policy, reference, lengths)
    assert torch.equal(loss[:1], plain[0])
    assert torch.equal(gradient[:1, :2], plain[1])
    assert torch.equal(gradient[0, 2:], torch.zeros(2, dtype=torch.float64))
    assert gradient[1].isfinite().all() and loss.isfinite().all()


@pytest.mark.parametrize("name", PAIRED)
def test_k_responses_are_the_mean_of_their_pairs(name):
    objective = get_objective(name, **SETTINGS[name])
    losses, gradient = losses_and_gradient(objective, POLICY, REFERENCE, LENGTHS)
    expected, slopes = torch.zeros_like(losses), torch.zeros_like(gradient)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for columns in map(list, pairs):
        loss, slope = losses_and_gradient(objective, *(x[:, columns] for x in (POLICY, REFERENCE, LENGTHS)))
        expected += loss / len(pairs)
        slopes[:, columns] += slope / len(pairs)
    assert_same((losses, gradient), (expected, slopes))


def test_sft_reads_the_first_response_alone():
    losses, gradient = losses_and_gradient(get_objective("sft"), POLICY, None, LENGTHS)
    assert losses.tolist() == pytest.approx([42.0 / 20, 33.9 / 17])
    assert gradient[:, 0].tolist() == pytest.approx([-1 / 20, -1 / 17])
    assert gradient[:, 1:].count_nonzero() == 0
    assert torch.equal(losses, losses_and_gradient(get_objective("sft"), POLICY[:, :1], None, LENGTHS[:, :1])[0])


@pytest.mark.parametrize("name", PAIRED)
def test_ties_are_skipped_and_unscored_rows_follow_position(name):
    objective = get_objective(name, **SETTINGS[name])
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0], [math.nan] * 4])
    losses, gradient = losses_and_gradient(objective, POLICY, REFERENCE, LENGTHS, response_scores=scores)
    plain, plain_gradient = losses_and_gradient(objective, POLICY, REFERENCE, LENGTHS)
    untied = [
        objective(*(x[:1, [i, j]] for x in (POLICY, REFERENCE, LENGTHS))).losses
        for i, j in ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))
    ]
    assert_same([losses[:1]], [torch.cat(untied).mean(dim=0, keepdim=True)])
    assert torch.equal(losses[1], plain[1])
    assert torch.equal(gradient[1], plain_gradient[1])


@pytest.mark.parametrize("name", PAIRED)
def test_a_row_without_any_pair_adds_nothing(name):
    objective = get_objective(name, **SETTINGS[name])
    tied = torch.tensor([[1.0, 1.0], [2.0, 1.0]])
    losses, gradient = losses_and_gradient(
        objective, POLICY[:, :2], REFERENCE[:, :2], LENGTHS[:, :2], response_scores=tied
    )
    assert losses[0] == 0 and gradient[0].count_nonzero() == 0
    assert losses[1] == objective(POLICY[1:, :2], REFERENCE[1:, :2], LENGTHS[1:, :2]).losses[0]
    one_response = losses_and_gradient(objective, POLICY[:, :1], REFERENCE[:, :1], LENGTHS[:, :1])
    assert_same(one_response, (torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)))


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_do_not_see_each_other(name):
    objective = get_objective(name, **SETTINGS[name])
    together = objective(POLICY, REFERENCE, LENGTHS).losses
    assert torch.equal(objective(POLICY.flip(0), REFERENCE.flip(0), LENGTHS.flip(0)).losses, together.flip(0))
    assert torch.equal(objective(POLICY[1:], REFERENCE[1:], LENGTHS[1:]).losses, together[1:])
    poisoned = POLICY.clone()
    poisoned[0, 0] = math.nan
    losses = objective(poisoned, REFERENCE, LENGTHS).losses
    assert losses[0].isnan() and losses[1] == together[1]


# ------------------------------------------------------------------------------------------------ numerics and dtypes
@pytest.mark.parametrize("name", SETTINGS)
def test_terms_sum_to_losses_and_the_dtype_is_kept(name):
    objective = get_objective(name, **SETTINGS[name])
    expected_terms = {"cal_": {"contrastive", "calibration"}, "sft": {"nll"}, "cpo": {"contrastive", "nll"}}
    for dtype, autocast in itertools.product((torch.float64, torch.float32), (False, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = objective(POLICY.to(dtype), REFERENCE, LENGTHS)  # a reference of another dtype changes nothing
        assert output.losses.dtype == dtype
        assert all(term.dtype == dtype and term.shape == (2,) for term in output.terms.values())
        assert torch.equal(torch.stack(list(output.terms.values())).sum(dim=0), output.losses)
        wanted = next((v for k, v in expected_terms.items() if name.startswith(k)), {"contrastive"})
        assert set(output.terms) == (wanted | {"nll"} if name == "dpo_nll" else wanted)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
@pytest.mark.parametrize("h", [-1e4, -100.0, -80.0, 100.0, 1e4])
def test_f_dpo_stays_finite(divergence, h):
    objective = get_objective("f_dpo", beta=0.1, divergence=divergence)
    for h_w, h_l in ((h, 0.0), (0.0, h), (h, h)):
        policy, reference, lengths = (x.float() for x in pair(h_w, h_l, 0.0, 0.0))
        loss, gradient = losses_and_gradient(objective, policy, reference, lengths)
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_f_dpo_with_a_small_alpha_keeps_its_digits_in_float32():
    policy, reference, lengths = VECTORS["A"]
    objective = get_objective("f_dpo", beta=0.1, divergence="alpha", alpha=1e-5)
    exact = objective(policy, reference, lengths).losses.item()
    assert objective(policy.float(), reference.float(), lengths).losses.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_far_from_the_reference_everything_is_finite_in_float32(name):
    objective = get_objective(name, **SETTINGS[name])
    for p_w, p_l in itertools.product((-1.0, -3000.0), repeat=2):
        policy, reference, lengths = (x.float() for x in pair(p_w, p_l, -1500.0, -1500.0))
        loss, gradient = losses_and_gradient(objective, policy, reference, lengths)
        assert loss.isfinite().all() and gradient.isfinite().all()


# -------------------------------------------------------------------------------------------------- options and needs
OTHER_VALUES = {
    "beta": 0.35,
    "calibration_weight": 0.25,
    "label_smoothing": 0.3,
    "length_normalize": False,
    "divergence": "js",
    "alpha": 0.6,
    "nll_weight": 0.2,
    "penalty": 7.0,
}


@pytest.mark.parametrize(
    ("name", "parameter"),
    [(name, key) for name, schema in SCHEMAS.items() for key in schema.model_fields if key != "name"],
)
def test_every_parameter_changes_the_result(name, parameter):
    changed = SETTINGS[name] | {parameter: OTHER_VALUES[parameter]}
    if changed.get("divergence", "alpha") != "alpha":
        with pytest.raises(ValueError, match="only divergence alpha uses it"):
            get_objective(name, **changed)
        del changed["alpha"]
    before = losses_and_gradient(get_objective(name, **SETTINGS[name]), POLICY, REFERENCE, LENGTHS)
    after = losses_and_gradient(get_objective(name, **changed), POLICY, REFERENCE, LENGTHS)
    assert (before[0] - after[0]).abs().min() > 1e-4
    assert (before[1] - after[1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_and_function_agree(name):
    function, schema = FUNCTIONS[name], SCHEMAS[name]
    vectors = vector_names(function)
    keywords = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {p.name for p in keywords} == set(schema.model_fields) - {"name"}
    assert all(p.default is p.empty for p in keywords)
    assert set(vectors) <= {"h_w", "h_l", "p_w", "p_l", "n_w", "n_l"}
    assert schema.needs_reference == any(vector.startswith("h") for vector in vectors)
    assert schema.min_responses == (2 if any(vector.endswith("_l") for vector in vectors) else 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_is_required_or_not_read(name):
    objective = get_objective(name, **SETTINGS[name])
    if objective.needs_reference:
        with pytest.raises(ValueError, match=f"{name}: reference_logps is None, but this objective compares with"):
            objective(POLICY, None, LENGTHS)
    else:
        without = losses_and_gradient(objective, POLICY, None, LENGTHS)
        assert_same(losses_and_gradient(objective, POLICY, torch.full_like(POLICY, math.nan), LENGTHS), without, 0.0)


def test_the_reference_gets_no_gradient():
    reference = REFERENCE.clone().requires_grad_()
    policy = POLICY.clone().requires_grad_()
    get_objective("cal_dpo")(policy, reference, LENGTHS).losses.sum().backward()
    assert reference.grad is None and policy.grad is not None


def test_shapes_that_would_broadcast_are_refused():
    objective = get_objective("dpo")
    with pytest.raises(ValueError, match=r"dpo: policy_logps has shape \(2, 4\), another input \(2, 1\); all must be"):
        objective(POLICY, REFERENCE[:, :1], LENGTHS)
    with pytest.raises(ValueError, match=r"another input \(4,\)"):
        objective(POLICY, REFERENCE, LENGTHS[0])
    with pytest.raises(ValueError, match=r"another input \(1, 4\)"):
        objective(POLICY, REFERENCE, LENGTHS, response_scores=torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"all must be \[rows, k\]"):
        objective(POLICY[0], REFERENCE[0], LENGTHS[0])


def test_names_of_other_projects_give_the_same_objective():
    assert get_objective("sigmoid").name == "dpo"
    assert get_objective("caldpo", cal_weight=0.5).parameters == {"beta": 0.001, "calibration_weight": 0.5}
    with pytest.raises(ValueError, match="unknown objective 'simpo'"):
        get_objective("simpo")
    with pytest.raises(ValueError, match="unknown parameter, did you mean beta"):
        get_objective("dpo", betas=0.1)


def test_a_config_section_gives_back_its_objective():
    section = parse_objective({"name": "f_dpo", "divergence": "alpha", "beta": 0.2})
    assert get_objective(**section.model_dump()).parameters == {"beta": 0.2, "divergence": "alpha", "alpha": 0.5}


def test_objectives_survive_pickling():
    objective = get_objective("cal_dpo", beta=0.1)
    copy = pickle.loads(pickle.dumps(objective))
    assert torch.equal(copy(POLICY, REFERENCE, LENGTHS).losses, objective(POLICY, REFERENCE, LENGTHS).losses)


def test_importing_objectives_loads_torch_and_nothing_else_that_is_heavy():
    code = (
        "import sys, caldpo_ray.objectives, caldpo_ray.metrics; loaded = set(sys.modules);"
        "print({'torch'} & loaded, {'ray', 'transformers', 'deepspeed', 'datasets', 'pyarrow'} & loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "{'torch'} set()\n"
    for module in ("pairwise", "single", "pairs"):
        tree = (HERE.parents[1] / "caldpo_ray" / "objectives" / f"{module}.py").read_text(encoding="utf-8")
        imports = [line for line in tree.splitlines() if line.startswith(("import ", "from "))]
        assert all(line.split()[1].split(".")[0] in ("torch", "dataclasses") for line in imports)


# --------------------------------------------------------------------------------------------- the user's own objective
CUSTOM = """
import torch

def hinge(policy_logps, reference_logps, lengths, *, beta):
    h = policy_logps - reference_logps
    return torch.relu(1 - beta * (h[:, 0] - h[:, 1]))

def soft(policy_logps, reference_logps, lengths, *, beta, soft_label, response_scores):
    assert reference_logps is None
    logits = beta * (policy_logps[:, 0] - policy_logps[:, 1])
    scored = response_scores[:, 0] - response_scores[:, 1]
    return {"pull": -soft_label * logits, "score": scored.to(logits.dtype)}

def everything(policy_logps, reference_logps, lengths, **columns):
    return policy_logps.new_full((len(policy_logps),), float(len(columns)))

def mean(policy_logps, reference_logps, lengths):
    return policy_logps.mean()

def nothing(policy_logps, reference_logps, lengths):
    return {}

def number(policy_logps, reference_logps, lengths):
    return {"a": policy_logps[:, 0], "b": 3.0}

def raises(policy_logps, reference_logps, lengths):
    return torch.functional.einsum("ij,k", policy_logps)

def leaves(policy_logps, reference_logps, lengths):
    raise SystemExit(7)

def two(policy_logps, reference_logps):
    return policy_logps[:, 0]

constant = 1.0
"""


@pytest.fixture
def custom(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(CUSTOM)
    (tmp_path / "broken_losses.py").write_text("import a_package_that_is_not_there")
    (tmp_path / "unparsable_losses.py").write_text("def f(:")
    (tmp_path / "leaving_losses.py").write_text("import sys\nsys.exit(7)")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for module in ("own_losses", "broken_losses", "unparsable_losses", "leaving_losses"):
        sys.modules.pop(module, None)


@pytest.mark.usefixtures("custom")
def test_own_function_equals_the_built_in_one():
    own = get_objective("own_losses:hinge", beta=0.02)
    batch = POLICY[:, :2], REFERENCE[:, :2], LENGTHS[:, :2]
    assert_same(losses_and_gradient(own, *batch), losses_and_gradient(get_objective("slic", beta=0.02), *batch))
    assert list(own(*batch).terms) == ["loss"]
    assert (own.needs_reference, own.min_responses, own.calibration_target) == (True, 2, None)
    with pytest.raises(ValueError, match="reference_logps is None"):
        own(POLICY, None, LENGTHS)


@pytest.mark.usefixtures("custom")
def test_own_function_gets_the_columns_it_asks_for():
    own = get_objective("own_losses:soft", beta=0.5, needs_reference=False, min_responses=3)
    scores, label = torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([0.7, 0.6])
    batch = POLICY[:, :2], None, LENGTHS[:, :2]
    output = own(POLICY[:, :2], REFERENCE[:, :2], LENGTHS[:, :2], response_scores=scores, soft_label=label, other=label)
    assert output.losses.tolist() == pytest.approx([-0.7 * 0.5 * 15.5 + 1, -0.6 * 0.5 * 9 + 3])
    assert (own.needs_reference, own.min_responses) == (False, 3)
    with pytest.raises(ValueError, match=r"own_losses:soft: missing a required argument: 'soft_label'.*add the column"):
        own(*batch, response_scores=scores)
    everything = get_objective("own_losses:everything", needs_reference=False)
    assert everything(*batch, response_scores=scores, soft_label=label).losses.tolist() == [2.0, 2.0]


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(
    ("name", "parameters", "says"),
    [
        ("no_such_module:f", {}, "cannot import no_such_module .*PYTHONPATH"),
        ("broken_losses:f", {}, "cannot import broken_losses .*a_package_that_is_not_there"),
        ("unparsable_losses:f", {}, "cannot import unparsable_losses .*invalid syntax .*line 1.*; mend it"),
        ("leaving_losses:f", {}, "cannot import leaving_losses .SystemExit: 7, .*leaving_losses.py line 2.; mend it"),
        (
            "own_losses:two",
            {},
            r"cannot be called as two\(policy_logps, reference_logps, lengths.*.too many positional",
        ),
        ("own_losses:missing", {}, "own_losses has no function 'missing'; define it"),
        ("own_losses:constant", {}, "own_losses has no function 'constant'"),
        ("own_losses:hinge", {"betta": 1.0}, "with the parameters betta .*unexpected keyword argument 'betta'"),
        ("own_losses:", {}, "must be package.module:function"),
    ],
)
def test_own_function_that_cannot_be_used_is_explained(name, parameters, says):
    with pytest.raises(InputError, match=says):
        get_objective(name, **parameters)
    with pytest.raises(InputError, match=says):  # before anything starts
        require_objective(parse_objective({"name": name, **parameters}))


@pytest.mark.usefixtures("custom")
def test_checking_a_built_in_objective_loads_no_torch_and_a_good_one_of_the_users_passes():
    require_objective(parse_objective({"name": "own_losses:hinge", "beta": 0.1}))
    code = (
        "import sys; from caldpo_ray.settings.objective_parameters import parse_objective as parse;"
        "from caldpo_ray.settings.user_code import require_objective; require_objective(parse({'name': 'dpo'}));"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("mean", r"returned loss: a tensor of shape \(\); return one loss per row, a tensor of shape \(2,\)"),
        ("nothing", "returned an empty dict"),
        ("number", "returned b: float"),
        ("raises", r"own_losses:raises: the function raised RuntimeError: .*, .*own_losses.py line \d+; mend it"),
        ("leaves", r"own_losses:leaves: the function raised SystemExit: 7, .*own_losses.py line \d+; mend it"),
    ],
)
def test_own_function_with_a_wrong_result_is_explained(function, says):
    with pytest.raises(ValueError, match=says):
        get_objective(f"own_losses:{function}")(POLICY, REFERENCE, LENGTHS)
