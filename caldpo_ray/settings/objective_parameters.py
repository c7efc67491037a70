"""The parameters of every objective: names, bounds, defaults, and the formula they resolve to.

This module holds the only default of each parameter and loads neither torch nor ray; the losses themselves are in
`caldpo_ray/objectives`. Symbols of the formulas: h = log-ratio policy - reference, p = policy log-prob (both sums over
response tokens, nats), n = response tokens, w = chosen, l = rejected, Δ = h_w - h_l, σ the logistic function. The unit
of beta is 1/nats and its useful scale differs by orders of magnitude between objectives: defaults are never shared.
"""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from caldpo_ray.errors import InputError
from caldpo_ray.settings.options import Options

Beta = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
LabelSmoothing = Annotated[float, Field(ge=0, lt=0.5)]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]


class _Parameters(Options):
    reads_first_only: ClassVar[bool] = False
    """Responses after the first are not read, and so need no forward pass."""

    @property
    def calibration_target(self) -> float | None:
        """Where h_w (and, negated, h_l) is pulled to, in nats; None where the objective names no such value."""
        return None


Schema = TypeVar("Schema", bound=_Parameters)


class _BuiltIn(_Parameters):
    needs_reference: ClassVar[bool] = True
    min_responses: ClassVar[int] = 2


class _Calibrated(_BuiltIn):
    beta: Beta = 0.001
    """1/nats; the target is ±1/(2 beta). Default: appendix of arXiv 2412.14516."""
    calibration_weight: Weight = 1.0
    """Weight of the calibration term: 1 in arXiv 2412.14516, Eq. 10; 0.5 reproduces the code the paper links to."""

    @property
    def calibration_target(self) -> float:
        return 0.5 / self.beta

    @property
    def _calibration(self) -> str:
        target = f"{self.calibration_target:g}"
        return f"{self.calibration_weight:g}·[(h_w - {target})² + (h_l + {target})²]"


class CalDpo(_Calibrated):
    """Cal-DPO, arXiv 2412.14516, Eq. 10."""

    name: Literal["cal_dpo"]

    @property
    def formula(self) -> str:
        return f"-log σ(Δ) + {self._calibration}"


class CalIpo(_Calibrated):
    """IPO with the calibration term, arXiv 2412.14516, section 4.3 (described in words there, no equation printed)."""

    name: Literal["cal_ipo"]

    @property
    def formula(self) -> str:
        return f"(Δ - {self.calibration_target:g})² + {self._calibration}"


class CalSlic(_Calibrated):
    """SLiC with the calibration term, arXiv 2412.14516, section 4.3 (described in words there, no equation printed)."""

    name: Literal["cal_slic"]

    @property
    def formula(self) -> str:
        return f"max(0, 1 - {self.beta:g}·Δ) + {self._calibration}"


class Dpo(_BuiltIn):
    """DPO, arXiv 2305.18290, Eq. 7; with label smoothing the conservative variant cDPO."""

    name: Literal["dpo"]
    beta: Beta = 0.1
    """1/nats. Default: TRL and the authors' code."""
    label_smoothing: LabelSmoothing = 0.0
    """Assumed share of labels that are the wrong way round."""

    @property
    def formula(self) -> str:
        if self.label_smoothing == 0:
            return f"-log σ({self.beta:g}·Δ)"
        keep, flip = f"{1 - self.label_smoothing:g}", f"{self.label_smoothing:g}"
        return f"-{keep}·log σ({self.beta:g}·Δ) - {flip}·log σ(-{self.beta:g}·Δ)"


class Ipo(_BuiltIn):
    """IPO, arXiv 2310.12036, Eq. 17; beta is the paper's τ."""

    name: Literal["ipo"]
    beta: Beta = 0.1
    """1/nats. Default: TRL, whose form is the length-normalised one; the sum form is used with 5e-4 to 0.2."""
    length_normalize: bool = False
    """Divide each log-ratio by its response's tokens: TRL, HALOs, LLaMA-Factory. False: sums, as in the paper."""

    @property
    def formula(self) -> str:
        margin = "h_w/n_w - h_l/n_l" if self.length_normalize else "Δ"
        return f"({margin} - {0.5 / self.beta:g})²"


class Slic(_BuiltIn):
    """The hinge loss that arXiv 2412.14516, Eq. 16, calls SLiC; TRL's `hinge`, and RSO's hinge-norm with γ = beta."""

    name: Literal["slic"]
    beta: Beta = 0.1
    """1/nats. Default: TRL."""

    @property
    def formula(self) -> str:
        return f"max(0, 1 - {self.beta:g}·Δ)"


class FDpo(_BuiltIn):
    """f-DPO, arXiv 2309.16240."""

    name: Literal["f_dpo"]
    beta: Beta = 0.1
    """1/nats. Default: TRL and the authors' code."""
    divergence: Divergence
    """The f-divergence that ties the policy to the reference."""
    alpha: Annotated[float, Field(gt=0, le=1)] | None = Field(default=None, validate_default=True)
    """Only for divergence alpha, then 0.5 by default: the paper's (0 reverse, 1 forward KL); TRL's is 1 - alpha."""

    @field_validator("alpha")
    @classmethod
    def _alpha_belongs_to_its_divergence(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        divergence = info.data.get("divergence", "alpha")
        if divergence == "alpha" and alpha is None:
            return 0.5
        if divergence != "alpha" and alpha is not None:
            raise ValueError(f"only divergence alpha uses it, and divergence is {divergence}; remove one of the two")
        return alpha

    @property
    def formula(self) -> str:
        score = {
            "reverse_kl": "h",
            "forward_kl": "-exp(-h)",
            "js": "log σ(h)",
            "alpha": f"(1 - exp(-{self.alpha}·h))/{self.alpha}",
        }[self.divergence]
        return f"-log σ({self.beta:g}·[g(h_w) - g(h_l)]), g(h) = {score}"


class Cpo(_BuiltIn):
    """CPO, arXiv 2401.08417: no reference; sums in the sigmoid, a mean in the likelihood term."""

    needs_reference: ClassVar[bool] = False
    name: Literal["cpo"]
    beta: Beta = 0.1
    """1/nats. Default: the authors' code."""
    nll_weight: Weight = 1.0
    """Weight of the chosen response's mean token NLL."""

    @property
    def formula(self) -> str:
        return f"-log σ({self.beta:g}·(p_w - p_l)) - {self.nll_weight:g}·p_w/n_w"


class Dpop(_BuiltIn):
    """DPO-Positive (Smaug), arXiv 2402.13228: a penalty once the chosen log-prob falls below the reference's."""

    name: Literal["dpop"]
    beta: Beta = 0.1
    """1/nats. Default: third-party code."""
    penalty: Weight = 50.0
    """Factor on max(0, -h_w). Default: reported for the paper; other projects use 5 or 0.1."""

    @property
    def formula(self) -> str:
        return f"-log σ({self.beta:g}·[Δ - {self.penalty:g}·max(0, -h_w)])"


class DpoNll(_BuiltIn):
    """DPO with a likelihood term, arXiv 2404.19733: the mean token NLL of the chosen response of each row."""

    name: Literal["dpo_nll"]
    beta: Beta = 0.1
    """1/nats. Default: TRL."""
    nll_weight: Weight = 1.0
    """Weight of the chosen response's mean token NLL. Default: TRL."""

    @property
    def formula(self) -> str:
        return f"-log σ({self.beta:g}·Δ) - {self.nll_weight:g}·p_w/n_w"


class Sft(_BuiltIn):
    """Supervised fine-tuning on the first response of each row; every row weighs the same, whatever its length."""

    needs_reference: ClassVar[bool] = False
    min_responses: ClassVar[int] = 1
    reads_first_only: ClassVar[bool] = True
    name: Literal["sft"]

    @property
    def formula(self) -> str:
        return "-p_w/n_w"


class CustomObjective(_Parameters):
    """The user's own function, called as `function(policy_logps, reference_logps, lengths, **parameters, **columns)`.

    Tensors are [rows, k]; a response that a row does not have has length 0 and must be ignored. It returns one loss per
    row, or a dict of terms that sum to it. All keys besides the fields below are its parameters.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """package.module:function"""
    needs_reference: bool = True
    """False skips the reference stage: `reference_logps` is then None."""
    min_responses: int = Field(default=2, ge=1)
    """Rows with fewer responses cannot be used: 2 for pairs, 1 for unpaired rows."""

    @property
    def formula(self) -> str:
        return f"{self.name.partition(':')[2]}(policy_logps, reference_logps, lengths)"


BuiltInParameters = CalDpo | CalIpo | CalSlic | Dpo | Ipo | Slic | FDpo | Cpo | Dpop | DpoNll | Sft
ObjectiveParameters = BuiltInParameters | CustomObjective

SCHEMAS: dict[str, type[BuiltInParameters]] = {
    "cal_dpo": CalDpo,
    "cal_ipo": CalIpo,
    "cal_slic": CalSlic,
    "dpo": Dpo,
    "ipo": Ipo,
    "slic": Slic,
    "f_dpo": FDpo,
    "cpo": Cpo,
    "dpop": Dpop,
    "dpo_nll": DpoNll,
    "sft": Sft,
}
NAME_ALIASES = {"sigmoid": "dpo", "cdpo": "dpo", "hinge": "slic", "caldpo": "cal_dpo", "dpnll": "dpo_nll"}
PARAMETER_ALIASES = {"cal_weight": "calibration_weight", "caldpo_lambda": "calibration_weight"}

_NLL = "adds an NLL with another reduction; use dpo_nll, whose nll_weight multiplies the mean token NLL of each row"
# Spellings of other projects whose unit or reduction differs: translating them silently would train another loss.
_NOT_ALIASES = {
    "rpo_alpha": f"in TRL and ms-swift it {_NLL}",
    "nll_loss_coef": f"in OpenRLHF it {_NLL}",
    "pref_ftx": f"in LLaMA-Factory it {_NLL}",
    "sft_loss_weight": f"in NeMo-RL it {_NLL}",
    "loss_weights": "losses are not mixed by lists here; dpo_nll and the cal_* objectives are the mixtures there are",
    "simpo_gamma": "it is beta times a margin of mean log-probs, and no objective here has such a margin",
    "f_alpha_divergence_coef": "in TRL it is 1 - alpha; use the objective f_dpo with divergence: alpha",
}


def parse_objective(given: Mapping[str, Any] | ObjectiveParameters) -> ObjectiveParameters:
    """The parameters of the objective that `given["name"]` names, with aliases resolved and defaults filled in.

    Raises InputError (a ValueError) naming the objective, the parameter, its value, the rule and what is valid.
    """
    if not isinstance(given, Mapping | _Parameters):
        raise InputError(f"the objective is {given!r}: must be a mapping with a name, for example {{name: cal_dpo}}")
    values = dict(given)
    name = values.pop("name", None)
    if isinstance(name, str) and ":" in name:
        return _validate(CustomObjective, name, values)
    canonical = NAME_ALIASES.get(str(name), str(name))
    if canonical not in SCHEMAS:
        raise InputError(_unknown_name(name))
    schema = SCHEMAS[canonical]
    parameters = _validate(schema, canonical, _canonical_keys(schema, canonical, values))
    if name == "cdpo" and isinstance(parameters, Dpo) and parameters.label_smoothing == 0:
        raise InputError("cdpo: label_smoothing is required and must be greater than 0; without it use dpo")
    return parameters


def _canonical_keys(schema: type[_Parameters], name: str, values: dict[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in values.items():
        if key in _NOT_ALIASES:
            raise InputError(f"{name}: {key} = {value!r}: not accepted: {_NOT_ALIASES[key]}")
        target = PARAMETER_ALIASES.get(key, key)
        target = target if target in schema.model_fields else key
        if target in renamed:
            raise InputError(f"{name}: {target} is given twice, once as {key} = {value!r}; keep one")
        renamed[target] = value
    return renamed


def _validate(schema: type[Schema], name: str, values: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate({"name": name, **values})
    except ValidationError as error:
        own = [field for field in schema.model_fields if field != "name"]
        mistakes = "; ".join(_explain(item, name, own) for item in error.errors())
        takes = f"its parameters are {', '.join(own)}" if own else "it has no parameters"
        raise InputError(f"{name}: {mistakes} ({takes})") from None


def _explain(item: Any, name: str, own: list[str]) -> str:
    key, value = str(item["loc"][0]), item["input"]
    if item["type"] == "missing":
        return f"{key} is required and not given"
    if item["type"] == "extra_forbidden":
        target = PARAMETER_ALIASES.get(key, key)
        others = [other for other, schema in SCHEMAS.items() if target in schema.model_fields]
        if others:
            return (
                f"{key} = {value!r}: not a parameter of this objective, only of {', '.join(others)}; remove it, or replace"
                f" all that a file says of its objective by objective='{{name: {name}}}'"
            )
        near = difflib.get_close_matches(key, own, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        return f"{key} = {value!r}: unknown parameter{hint}"
    if item["type"] == "string_pattern_mismatch":
        return f"{key} = {value!r}: must be package.module:function"
    rule = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return f"{key} = {value!r}: {rule}"


def _unknown_name(name: Any) -> str:
    near = difflib.get_close_matches(str(name), [*SCHEMAS, *NAME_ALIASES], n=1)
    hint = f", did you mean {NAME_ALIASES.get(near[0], near[0])}?" if near else ""
    found = "no objective is named" if name is None else f"unknown objective {name!r}"
    return f"{found}{hint}; name is one of {', '.join(SCHEMAS)}, or your own function as package.module:function"
