# SPDX-License-Identifier: Apache-2.0
"""Few-step samplers in numpy: a sampler is a table of constants and a pure step.

Names are the maths: `x_t` latents at the current noise level, `x_0` the predicted clean latents, `eps` the
predicted noise. What a multistep sampler remembers goes in and out of its step as a `Memory`. Every sampler equals the
diffusers scheduler of its name to 1e-5 when both are handed the same noise.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...ground.errors import TurbopocketError
from ..schedule import SamplerSpec, alphas_cumprod, sigmas, timesteps

Array = NDArray[np.float32]
NoiseSource = Callable[[tuple[int, ...]], Array]
"""Fresh standard normal numbers of a shape; called only when a step needs them."""


@dataclass(frozen=True)
class Memory:
    """What the calls of one walk so far leave for the next step; empty before the first call, wherever that is."""

    outputs: tuple[Array, ...] = ()
    """PNDM: up to four outputs of the model, DPM-Solver++: the last predicted clean latents; the newest last."""
    x_first: Array | None = None
    """PNDM: the latents of the first call, from which the second call steps once more."""


class Sampler(ABC):
    """One walk from noise to clean latents: at each of `timesteps` ask the model, then `step`.

    `index` is everywhere that of the model call, which is that of its timestep.
    """

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        self.spec = spec
        self.steps = steps
        self.timesteps = timesteps(spec, steps)
        self.bound: Callable[[Array], Array] = self._bounded
        """What is done to predicted clean latents before a step goes on from them."""

    def _bounded(self, x_0: Array) -> Array:
        limit = self.spec.clip_sample_range
        return x_0 if limit is None else np.clip(x_0, -limit, limit)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the latents the walk starts from."""
        return 1.0

    def scale_model_input(self, x_t: Array, index: int) -> Array:
        """`x_t` as the model wants to see it."""
        return x_t

    @abstractmethod
    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The latents one step cleaner than `x_t`, given what the model said about them, and the memory after it."""

    def start_index(self, strength: float) -> int:
        """The call at which a walk begins that shall change a picture by `strength`, in (0, 1]: 1 is the whole walk.

        Raises TurbopocketError for another strength, and for one that leaves no step.
        """
        if not 0 < strength <= 1:
            raise TurbopocketError(f"strength {strength:g} was asked: it must be above 0, and 1 at most")
        if int(self.steps * strength) < 1:
            raise TurbopocketError(
                f"strength {strength:g} leaves none of {self.steps} steps: it must be "
                f"{math.ceil(1000 / self.steps) / 1000:g} at least"
            )
        return self.steps - int(self.steps * strength)

    @abstractmethod
    def add_noise(self, x_0: Array, noise: Array, index: int) -> Array:
        """Clean latents made as noisy as the model expects them at call `index`."""


class _SigmaSampler(Sampler):
    """The variance-exploding view of Karras et al. 2022 (arXiv 2206.00364): x_t = x_0 + sigma * eps."""

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        super().__init__(spec, steps)
        self.sigmas = sigmas(spec, steps)

    @property
    def init_noise_sigma(self) -> float:
        """The largest sigma, or sqrt(sigma^2 + 1) with leading spacing.

        Leading spacing starts short of pure noise, where latents have the signal's variance as well.
        """
        largest = self.sigmas.max()
        if self.spec.timestep_spacing == "leading":
            return float(np.sqrt(largest**2 + 1))
        return float(largest)

    def scale_model_input(self, x_t: Array, index: int) -> Array:
        """`x_t` back at unit variance, the scale of training."""
        return x_t / np.sqrt(self.sigmas[index] ** 2 + 1)

    def add_noise(self, x_0: Array, noise: Array, index: int) -> Array:
        """x_0 + sigma * noise."""
        return x_0 + self.sigmas[index] * noise

    def derivative(self, index: int, x_t: Array, model_output: Array) -> Array:
        """dx/dsigma at `x_t`, which is the predicted noise."""
        if self.spec.prediction_type == "epsilon":
            return model_output
        sigma = self.sigmas[index]
        x_0 = x_t / (sigma**2 + 1) - model_output * sigma / np.sqrt(sigma**2 + 1)
        return (x_t - x_0) / sigma


class EulerSampler(_SigmaSampler):
    """Euler's method on the probability flow (Karras et al. 2022, algorithm 2 without churn)."""

    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The latents at the next sigma; draws no noise."""
        slope = self.derivative(index, x_t, model_output)
        return x_t + slope * (self.sigmas[index + 1] - self.sigmas[index]), memory


class EulerAncestralSampler(_SigmaSampler):
    """Euler's method to a lower sigma, then fresh noise up to the next one: SDXL-Turbo's sampler."""

    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The latents at the next sigma; draws noise in every step but the last."""
        sigma, sigma_next = self.sigmas[index : index + 2]
        sigma_up = np.sqrt(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)
        sigma_down = np.sqrt(sigma_next**2 - sigma_up**2)
        x_down = x_t + self.derivative(index, x_t, model_output) * (sigma_down - sigma)
        return (x_down + noise(x_t.shape) * sigma_up if sigma_up > 0 else x_down), memory


class _AlphaSampler(Sampler):
    """The variance-preserving view: x_t = sqrt(alpha) * x_0 + sqrt(1 - alpha) * eps."""

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        super().__init__(spec, steps)
        self.alphas = alphas_cumprod(spec)

    def add_noise(self, x_0: Array, noise: Array, index: int) -> Array:
        """sqrt(alpha) * x_0 + sqrt(1 - alpha) * noise."""
        alpha = self.alphas[int(self.timesteps[index])]
        return np.sqrt(alpha) * x_0 + np.sqrt(1 - alpha) * noise

    def alpha_before(self, timestep: int) -> np.float32:
        """Where a step from `timestep` leads: one stride of timesteps earlier, or to the end."""
        earlier = timestep - self.spec.num_train_timesteps // self.steps
        final = np.float32(1) if self.spec.set_alpha_to_one else self.alphas[0]
        return self.alphas[earlier] if earlier >= 0 else final

    def predict(self, x_t: Array, model_output: Array, alpha: np.float32) -> tuple[Array, Array]:
        """(x_0, eps) as the model sees them; x_0 clipped where the spec says so, eps left as predicted."""
        signal, sigma = np.sqrt(alpha), np.sqrt(1 - alpha)
        if self.spec.prediction_type == "epsilon":
            x_0, eps = (x_t - sigma * model_output) / signal, model_output
        else:
            x_0, eps = signal * x_t - sigma * model_output, signal * model_output + sigma * x_t
        return self.bound(x_0), eps


class DdimSampler(_AlphaSampler):
    """DDIM with eta 0 (Song et al. 2021, arXiv 2010.02502, equation 12)."""

    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The latents one stride of timesteps earlier; draws no noise."""
        timestep = int(self.timesteps[index])
        alpha_next = self.alpha_before(timestep)
        x_0, eps = self.predict(x_t, model_output, self.alphas[timestep])
        return np.sqrt(alpha_next) * x_0 + np.sqrt(1 - alpha_next) * eps, memory


class LcmSampler(_AlphaSampler):
    """Multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378, algorithm 3)."""

    sigma_data = 0.5

    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The predicted clean latents, noised to the next timestep in every step but the last."""
        timestep = int(self.timesteps[index])
        scaled = np.float32(timestep * self.spec.timestep_scaling)
        c_skip = self.sigma_data**2 / (scaled**2 + self.sigma_data**2)
        c_out = scaled / np.sqrt(scaled**2 + self.sigma_data**2)
        x_0, _ = self.predict(x_t, model_output, self.alphas[timestep])
        denoised = c_out * x_0 + c_skip * x_t
        if index + 1 == self.steps:
            return denoised, memory
        alpha_next = self.alphas[int(self.timesteps[index + 1])]
        return np.sqrt(alpha_next) * denoised + np.sqrt(1 - alpha_next) * noise(x_t.shape), memory


class PndmSampler(_AlphaSampler):
    """Pseudo linear multistep, PLMS (Liu et al. 2022, arXiv 2202.09778, equation 12, without Runge-Kutta steps).

    The first step is done twice, from the same latents: the model is asked where it led, and the mean of both outputs
    steps again.
    """

    _ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The latents one stride of timesteps earlier; draws no noise."""
        timestep = int(self.timesteps[index])
        if memory.x_first is not None:
            timestep += self.spec.num_train_timesteps // self.steps
            mean: Array = (model_output + memory.outputs[-1]) / np.float32(2)
            return self._transfer(memory.x_first, mean, timestep), Memory(memory.outputs)
        outputs = (*memory.outputs[-3:], model_output)
        weights = self._ADAMS_BASHFORTH[len(outputs) - 1]
        terms = [np.float32(weight) * each for weight, each in zip(weights, reversed(outputs), strict=True)]
        output = sum(terms[1:], terms[0])
        return self._transfer(x_t, output, timestep), Memory(outputs, x_t if len(outputs) == 1 else None)

    def _transfer(self, x_t: Array, model_output: Array, timestep: int) -> Array:
        """Equation 9: to one stride earlier along the straight line of the predicted noise."""
        alpha, alpha_next = self.alphas[timestep], self.alpha_before(timestep)
        _, eps = self.predict(x_t, model_output, alpha)
        scale = alpha * np.sqrt(1 - alpha_next) + np.sqrt(alpha * (1 - alpha) * alpha_next)
        return np.sqrt(alpha_next / alpha) * x_t - (alpha_next - alpha) * eps / scale


class DpmSolverSampler(Sampler):
    """DPM-Solver++ (2M) and its stochastic variant (Lu et al. 2022, arXiv 2211.01095, algorithm 2 and appendix B).

    Latents keep unit variance; lambda = -log(sigma) is the paper's half log signal-to-noise ratio.
    """

    def __init__(self, spec: SamplerSpec, steps: int) -> None:
        super().__init__(spec, steps)
        self.sigmas = sigmas(spec, steps)
        if spec.solver_order == 2 and (np.diff(self.sigmas[:-1]) >= 0).any():
            raise ValueError(f"{steps} steps with {spec.timestep_spacing} spacing ask at one timestep twice")

    def add_noise(self, x_0: Array, noise: Array, index: int) -> Array:
        """(x_0 + sigma * noise) / sqrt(sigma^2 + 1)."""
        sigma = self.sigmas[index]
        return (x_0 + sigma * noise) / np.sqrt(sigma**2 + 1)

    def step(
        self, index: int, x_t: Array, model_output: Array, memory: Memory, noise: NoiseSource
    ) -> tuple[Array, Memory]:
        """The latents at the next sigma; the stochastic variant draws noise in every step but one to sigma 0."""
        sigma, sigma_next = self.sigmas[index : index + 2]
        x_0 = self._clean(x_t, model_output, sigma)
        remembered = Memory((x_0,))
        if sigma_next == sigma:  # at the end, where the last call was already at the smallest sigma
            return x_t, remembered
        stochastic = self.spec.algorithm_type == "sde-dpmsolver++"
        scale, scale_next = np.sqrt(sigma**2 + 1), np.sqrt(sigma_next**2 + 1)
        kept = (sigma_next / sigma) ** (2 if stochastic else 1)
        x_next = (kept / scale_next * scale) * x_t + ((1 - kept) / scale_next) * x_0
        if memory.outputs and not self._ends_in_first_order(index):
            step, step_before = np.log(sigma / sigma_next), np.log(self.sigmas[index - 1] / sigma)
            slope = (x_0 - memory.outputs[-1]) * (step / step_before)
            if self.spec.solver_type == "midpoint":
                weight = (1 - kept) / 2
            else:
                weight = 1 - (1 - kept) / (step * (2 if stochastic else 1))
            x_next = x_next + (weight / scale_next) * slope
        if stochastic and sigma_next > 0:
            x_next = x_next + (sigma_next / scale_next * np.sqrt(1 - kept)) * noise(x_t.shape)
        return x_next, remembered

    def _clean(self, x_t: Array, model_output: Array, sigma: np.float32) -> Array:
        signal = 1 / np.sqrt(sigma**2 + 1)
        if self.spec.prediction_type == "epsilon":
            return (x_t - sigma * signal * model_output) / signal
        return signal * x_t - sigma * signal * model_output

    def _ends_in_first_order(self, index: int) -> bool:
        spec, few = self.spec, self.steps < 15
        last = index + 1 == self.steps
        ends_low = spec.euler_at_final or (spec.lower_order_final and few) or spec.final_sigmas_type == "zero"
        return spec.solver_order == 1 or (last and ends_low)


SAMPLERS: dict[str, type[Sampler]] = {
    "euler": EulerSampler,
    "euler_ancestral": EulerAncestralSampler,
    "dpmpp_2m": DpmSolverSampler,
    "pndm": PndmSampler,
    "ddim": DdimSampler,
    "lcm": LcmSampler,
}
"""The sampler of each of `SAMPLER_KINDS`."""


def make_sampler(spec: SamplerSpec, steps: int | None = None) -> Sampler:
    """The sampler that `spec` describes, for `steps` steps or as many as the spec was built for.

    Raises TurbopocketError when its schedule does not have that many.
    """
    try:
        return SAMPLERS[spec.kind](spec, spec.steps if steps is None else steps)
    except ValueError as error:
        raise TurbopocketError(f"sampler {spec.kind}: {error}") from error
