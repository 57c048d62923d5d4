"""The mathematics of every loss as functions of logits, with one value per position.

Arguments are ``(student_logits, teacher_logits, *, temperature=1.0, **options)``. The functions
neither multiply by T², nor shift, nor reduce.
"""

from otkd.functional.batch_transport import batch_sinkhorn_distance
from otkd.functional.divergences import (
    adaptive_kl_divergence,
    alpha_beta_divergence,
    hellinger_divergence,
    jensen_shannon_divergence,
    kl_divergence,
    reverse_kl_divergence,
    skew_kl_divergence,
    skew_reverse_kl_divergence,
    total_variation_distance,
    universal_logit_distance,
)
from otkd.functional.transport import sinkhorn_divergence
from otkd.functional.transport_kl import transport_kl_divergence
from otkd.functional.wasserstein import wasserstein_distance

__all__ = [
    "adaptive_kl_divergence",
    "alpha_beta_divergence",
    "batch_sinkhorn_distance",
    "hellinger_divergence",
    "jensen_shannon_divergence",
    "kl_divergence",
    "reverse_kl_divergence",
    "sinkhorn_divergence",
    "skew_kl_divergence",
    "skew_reverse_kl_divergence",
    "total_variation_distance",
    "transport_kl_divergence",
    "universal_logit_distance",
    "wasserstein_distance",
]
