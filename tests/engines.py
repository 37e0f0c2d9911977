"""What tests of the gradient engines share: batches from plain inputs, and weights from coefficients."""

import torch

from hf_orthograd.data import Batch
from hf_orthograd.gradients import ForgetBatch
from hf_orthograd.projection import UpdateWeights


def count(inputs):
    return next(len(value) for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)


def forget_batch(inputs, slopes=torch.ones_like):
    return ForgetBatch(inputs, count(inputs), slopes)


def retain_batch(inputs):
    return Batch(inputs, count(inputs))


def weighed(forget, retain_mean, coefficients):
    """`forget * g_u + retain_mean * mean_i g_i + sum_i c_i g_i`, the c of each projected parameter, shape (k,)."""
    projected = {name: retain_mean / len(own) + own.float() for name, own in coefficients.items()}
    return UpdateWeights(forget, retain_mean, projected)
