"""Losses on preference pairs: one pure function per objective.

Every argument is a vector [pairs], and its name says what it holds: h_w, h_l log-ratios policy - reference, p_w, p_l
policy log-probs (all sums over response tokens, in nats), n_w, n_l scored response tokens; w chosen, l rejected. A
function asks for exactly the vectors it uses: one without h_* needs no reference. Parameters are keyword-only and
have no defaults here (`caldpo_ray/settings/objective_parameters.py` has them). The result is a dict of terms [pairs] that sum
to the loss, in the dtype of the input.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

Terms = dict[str, Tensor]

MAX_EXPONENT = 80.0  # exp(80) is 5.5e34: float32 overflows above exp(88.7)


def cal_dpo(h_w: Tensor, h_l: Tensor, *, beta: float, calibration_weight: float) -> Terms:
    """-log σ(h_w - h_l) + weight·[(h_w - 1/(2β))² + (h_l + 1/(2β))²].

    Cal-DPO, arXiv 2412.14516, Eq. 10 (there weight 1). No β inside the sigmoid; the target is 1/(2β), not β/2 as the
    paper's Algorithm 1 prints (the first author confirms Eq. 10).
    """
    return {
        "contrastive": -logsigmoid(h_w - h_l),
        "calibration": _calibration(h_w, h_l, beta, calibration_weight),
    }


def cal_ipo(h_w: Tensor, h_l: Tensor, *, beta: float, calibration_weight: float) -> Terms:
    """(h_w - h_l - 1/(2β))² + weight·[(h_w - 1/(2β))² + (h_l + 1/(2β))²].

    arXiv 2412.14516, section 4.3. Form inferred: the paper describes it in words only. The two terms disagree: IPO
    wants a margin of 1/(2β), calibration one of 1/β; at weight 1 the minimum lies at 2/(3β).
    """
    return {
        "contrastive": (h_w - h_l - 0.5 / beta).square(),
        "calibration": _calibration(h_w, h_l, beta, calibration_weight),
    }


def cal_slic(h_w: Tensor, h_l: Tensor, *, beta: float, calibration_weight: float) -> Terms:
    """max(0, 1 - β(h_w - h_l)) + weight·[(h_w - 1/(2β))² + (h_l + 1/(2β))²].

    arXiv 2412.14516, section 4.3. Form inferred: the paper describes it in words only.
    """
    return {
        "contrastive": relu(1 - beta * (h_w - h_l)),
        "calibration": _calibration(h_w, h_l, beta, calibration_weight),
    }


def dpo(h_w: Tensor, h_l: Tensor, *, beta: float, label_smoothing: float) -> Terms:
    """-(1 - ε)·log σ(β(h_w - h_l)) - ε·log σ(-β(h_w - h_l)).

    DPO, arXiv 2305.18290, Eq. 7; ε > 0 is cDPO (eric-mitchell/direct-preference-optimization).
    """
    logits = beta * (h_w - h_l)
    return {"contrastive": -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)}


def ipo(h_w: Tensor, h_l: Tensor, n_w: Tensor, n_l: Tensor, *, beta: float, length_normalize: bool) -> Terms:
    """(h_w - h_l - 1/(2β))², or with length_normalize (h_w/n_w - h_l/n_l - 1/(2β))².

    IPO, arXiv 2310.12036, Eq. 17 (sums; β is τ). The mean form is that of TRL, HALOs and LLaMA-Factory. A β that is
    right for one form is wrong for the other by about the length of a response.
    """
    margin = h_w / n_w - h_l / n_l if length_normalize else h_w - h_l
    return {"contrastive": (margin - 0.5 / beta).square()}


def slic(h_w: Tensor, h_l: Tensor, *, beta: float) -> Terms:
    """max(0, 1 - β(h_w - h_l)).

    arXiv 2412.14516, Eq. 16; equals the hinge-norm loss of RSO, arXiv 2309.06657, with γ = β. Not the reference-free
    loss of SLiC-HF. The gradient is exactly 0 beyond a margin of 1/β.
    """
    return {"contrastive": relu(1 - beta * (h_w - h_l))}


def f_dpo(h_w: Tensor, h_l: Tensor, *, beta: float, divergence: str, alpha: float | None) -> Terms:
    """-log σ(β[g(h_w) - g(h_l)]), g(log u) = f'(u) up to a constant.

    f-DPO, arXiv 2309.16240. reverse_kl: g = h (this is DPO); forward_kl: -e^(-h); js: log σ(h);
    alpha: (1 - e^(-αh))/α, where the paper's -e^(-αh)/α differs by a constant that cancels. α is the paper's (α → 0
    reverse KL, 1 forward KL); TRL's coefficient is 1 - α.
    """
    return {"contrastive": -logsigmoid(beta * (_score(h_w, divergence, alpha) - _score(h_l, divergence, alpha)))}


def f_dpo_clamped(h_w: Tensor, h_l: Tensor, *, divergence: str, alpha: float | None) -> Tensor:
    """[pairs] bool: does f_dpo cut an exponent of this pair (its gradient there is 0)?"""
    rate = {"forward_kl": 1.0, "alpha": alpha or 0.0}.get(divergence, 0.0)
    return -rate * torch.minimum(h_w, h_l) > MAX_EXPONENT


def cpo(p_w: Tensor, p_l: Tensor, n_w: Tensor, *, beta: float, nll_weight: float) -> Terms:
    """-log σ(β(p_w - p_l)) - weight·p_w/n_w.

    CPO, arXiv 2401.08417, as in fe1ixxu/ALMA: sums in the sigmoid, the mean over tokens in the likelihood term.
    """
    return {"contrastive": -logsigmoid(beta * (p_w - p_l)), "nll": -nll_weight * p_w / n_w}


def dpop(h_w: Tensor, h_l: Tensor, *, beta: float, penalty: float) -> Terms:
    """-log σ(β[h_w - h_l - penalty·max(0, -h_w)]).

    DPO-Positive (Smaug), arXiv 2402.13228; equals DPO while h_w >= 0.
    """
    return {"contrastive": -logsigmoid(beta * (h_w - h_l - penalty * relu(-h_w)))}


def dpo_nll(h_w: Tensor, h_l: Tensor, p_w: Tensor, n_w: Tensor, *, beta: float, nll_weight: float) -> Terms:
    """-log σ(β(h_w - h_l)) - weight·p_w/n_w.

    Iterative reasoning preference optimisation, arXiv 2404.19733: the likelihood term is the mean over the tokens of
    each chosen response.
    """
    return {"contrastive": -logsigmoid(beta * (h_w - h_l)), "nll": -nll_weight * p_w / n_w}


def _calibration(h_w: Tensor, h_l: Tensor, beta: float, weight: float) -> Tensor:
    target = 0.5 / beta
    return weight * ((h_w - target).square() + (h_l + target).square())


def _score(h: Tensor, divergence: str, alpha: float | None) -> Tensor:
    match divergence, alpha:
        case "reverse_kl", None:
            return h
        case "forward_kl", None:
            return -torch.exp((-h).clamp(max=MAX_EXPONENT))
        case "js", None:
            return logsigmoid(h)
        case "alpha", float():
            # expm1 keeps the digits that e^(-αh)/α loses in float32 when α is small.
            return -torch.expm1((-alpha * h).clamp(max=MAX_EXPONENT)) / alpha
    raise ValueError(f"f_dpo: divergence {divergence!r} with alpha {alpha!r} is not defined")
