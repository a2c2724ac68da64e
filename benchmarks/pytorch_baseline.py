# mypy: disable-error-code="import-not-found"
"""The paper's algorithm in PyTorch, batched by hand, as its method section describes it.

The Jacobian of the decoder comes from pushing the ReLU masks through the weight matrices. Written
to be fast: one matrix product a layer for the whole batch's Jacobians, noise scale folded into the
last layer, Cholesky solves, no inverse, nothing computed twice.
"""

from typing import Any

import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal
from torch.nn.functional import linear

from benchmarks.measure import GEMM, time_in_turns

LOG_2PI = float(np.log(2 * np.pi))


def prepare(threads: int) -> None:
    """Give PyTorch as many threads as there are cores."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)


def gemm_rate() -> float:
    """The rate that `measure.gemm_rate` measures, of PyTorch."""
    rows, inner, columns = GEMM
    a, b = torch.ones(rows, inner), torch.ones(inner, columns)
    timing = time_in_turns({"gemm": lambda: a.mm(b)}, rounds=5, seconds_each=0.2)
    return 2 * rows * inner * columns / timing["gemm"].best


def tensor(array: Any) -> torch.Tensor:
    """A copy of a JAX or NumPy array."""
    return torch.tensor(np.array(array), dtype=torch.float32).contiguous()


def normal(*shape: int) -> torch.Tensor:
    """Standard normal noise."""
    return torch.randn(*shape)


class TorchVLAE:
    """Encoder, decoder and one shared variance, with the weights of a JAX model."""

    def __init__(self, model: Any) -> None:
        def weights(layer: Any) -> list[torch.Tensor]:
            kernel = np.array(layer.kernel[...]).T
            return [tensor(kernel).requires_grad_(), tensor(layer.bias[...]).requires_grad_()]

        self.encoder = [weights(layer) for layer in (*model.encoder.layers, model.mean)]
        self.decoder = [weights(layer) for layer in (*model.features.layers, model.head)]
        self.log_var = tensor(model.log_var).requires_grad_()
        layers = (*self.encoder, *self.decoder)
        self.parameters = [*(part for layer in layers for part in layer), self.log_var]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The posterior mean's first guess, (batch, latent)."""
        for weight, bias in self.encoder[:-1]:
            x = linear(x, weight, bias).relu()
        return linear(x, *self.encoder[-1])

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """The mean of x, (batch, dim)."""
        for weight, bias in self.decoder[:-1]:
            z = linear(z, weight, bias).relu()
        return linear(z, *self.decoder[-1])

    def log_joint(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The log joint of each image, nats, (batch,)."""
        square = (x - self.decode(z)).square().sum(-1)
        constant = x.shape[-1] * (LOG_2PI + self.log_var) + z.shape[-1] * LOG_2PI
        return -0.5 * (square * (-self.log_var).exp() + z.square().sum(-1) + constant)

    def features(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The last hidden layer, (batch, hidden), and its Jacobian, (batch, latent, hidden)."""
        (weight, bias), *rest = self.decoder[:-1]
        before = linear(z, weight, bias)
        jacobian = weight.T * (before > 0).to(z.dtype)[:, None, :]
        for weight, bias in rest:
            before = linear(before.relu(), weight, bias)
            jacobian = linear(jacobian, weight).mul_((before > 0).to(z.dtype)[:, None, :])
        return before.relu(), jacobian

    def loss(self, x: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """Minus the one-sample ELBO, differentiable through every step of the search."""
        scale = (-0.5 * self.log_var).exp()
        weight, bias = (scale * part for part in self.decoder[-1])
        scaled_x = scale * x
        identity = torch.eye(noise.shape[-1])
        z = self.encode(x)
        for t in range(steps):
            hidden, inner = self.features(z)
            jacobian = linear(inner, weight)
            residual = scaled_x - linear(hidden, weight, bias)
            gradient = (jacobian @ residual[:, :, None]).squeeze(-1) - z
            chol = torch.linalg.cholesky(_square(jacobian) + identity)
            z = z + 0.5 / (t + 1) * torch.cholesky_solve(gradient[:, :, None], chol).squeeze(-1)
        _, inner = self.features(z)
        chol = torch.linalg.cholesky(_square(linear(inner, weight)) + identity)
        return self._negative_elbo(x, z, chol, noise)

    def loss_by_gram(self, x: torch.Tensor, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """The number of `loss`, by the package's arithmetic: the last layer compressed once."""
        scale = (-0.5 * self.log_var).exp()
        weight, bias = (scale * part for part in self.decoder[-1])
        gram = weight.T @ weight
        projected = (scale * x - bias) @ weight
        identity = torch.eye(noise.shape[-1])
        z = self.encode(x)
        for t in range(steps):
            hidden, inner = self.features(z)
            weighted = linear(inner, gram)
            slope = projected - linear(hidden, gram)
            gradient = (inner @ slope[:, :, None]).squeeze(-1) - z
            chol = torch.linalg.cholesky(weighted @ inner.mT + identity)
            z = z + 0.5 / (t + 1) * torch.cholesky_solve(gradient[:, :, None], chol).squeeze(-1)
        _, inner = self.features(z)
        chol = torch.linalg.cholesky(linear(inner, gram) @ inner.mT + identity)
        return self._negative_elbo(x, z, chol, noise)

    def _negative_elbo(
        self, x: torch.Tensor, mode: torch.Tensor, chol: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        sample = torch.linalg.solve_triangular(chol.mT, noise[:, :, None], upper=True)
        z = mode + sample.squeeze(-1)
        log_det_chol = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_q = log_det_chol - 0.5 * (noise.square().sum(-1) + noise.shape[-1] * LOG_2PI)
        return -(self.log_joint(x, z) - log_q).mean()

    def gradient(
        self, x: torch.Tensor, noise: torch.Tensor, steps: int, *, by_gram: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The loss and its gradient with respect to every parameter."""
        loss = (self.loss_by_gram if by_gram else self.loss)(x, noise, steps)
        return loss.detach(), torch.autograd.grad(loss, self.parameters)

    @torch.no_grad()
    def log_prob(
        self,
        x: torch.Tensor,
        mean: torch.Tensor,
        precision: torch.Tensor,
        *,
        samples: int,
        chunk: int,
    ) -> torch.Tensor:
        """Estimate log p(x) of each image by importance sampling from N(mean, precision⁻¹).

        One factorization and one inverse of the factor an image; image by image and chunk by
        chunk, in place, so that what is worked on stays in the cache.
        """
        latent = mean.shape[-1]
        chol = torch.linalg.cholesky(precision)
        scale_t = torch.linalg.solve_triangular(chol, torch.eye(latent), upper=False)
        log_det_chol = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = x.shape[-1] * (LOG_2PI + self.log_var)
        estimates = []
        for i in range(len(x)):
            *hidden_layers, (head, head_bias) = self.decoder
            bias = head_bias - x[i]  # the last product gives the residual itself
            weights = []
            for start in range(0, samples, chunk):
                noise = torch.randn(min(chunk, samples - start), latent)
                z = torch.addmm(mean[i], noise, scale_t[i])
                a = z
                for weight, shift in hidden_layers:
                    a = torch.addmm(shift, a, weight.T).relu_()
                residual = torch.addmm(bias, a, head.T)
                square = torch.linalg.vector_norm(residual, dim=-1).square_()
                square = square * (-self.log_var).exp() + z.square().sum(-1)
                weights.append(0.5 * (noise.square().sum(-1) - square))
            log_mean = torch.cat(weights).logsumexp(0) - np.log(samples)
            estimates.append(log_mean - 0.5 * constant - log_det_chol[i])
        return torch.stack(estimates)

    @torch.no_grad()
    def log_prob_by_distributions(
        self,
        x: torch.Tensor,
        mean: torch.Tensor,
        precision: torch.Tensor,
        *,
        samples: int,
        chunk: int,
    ) -> torch.Tensor:
        """The estimate of `log_prob`, written plainly with `torch.distributions` and not tuned."""
        prior = Normal(torch.zeros(()), torch.ones(()))
        estimates = []
        for i in range(len(x)):
            proposal = MultivariateNormal(mean[i], precision_matrix=precision[i])
            weights = []
            for start in range(0, samples, chunk):
                z = proposal.sample((min(chunk, samples - start),))
                likelihood = Normal(self.decode(z), (0.5 * self.log_var).exp())
                log_joint = likelihood.log_prob(x[i]).sum(-1) + prior.log_prob(z).sum(-1)
                weights.append(log_joint - proposal.log_prob(z))
            estimates.append(torch.cat(weights).logsumexp(0) - np.log(samples))
        return torch.stack(estimates)


class _Square(torch.autograd.Function):
    """J Jᵀ of each J. Its pullback is one product instead of the two that autograd would take."""

    @staticmethod
    def forward(ctx: Any, jacobian: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(jacobian)
        return jacobian @ jacobian.mT

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor) -> torch.Tensor:
        (jacobian,) = ctx.saved_tensors
        return (cotangent + cotangent.mT) @ jacobian


def _square(jacobian: torch.Tensor) -> torch.Tensor:
    return _Square.apply(jacobian)
