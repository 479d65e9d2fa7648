"""Training of one model: the forward pass, the optimization step, averaged weights, and the state on disk.

    crops ──► AudioEncoder ──► codebooks (straight-through) ──► AudioDecoder ──► samples ──► SpectralLoss
                                    └► commitment loss               └► coarse mel ──► L1

The modules of the model itself are trained, so the exported checkpoint is what ``--model_path`` runs. The first steps
leave the quantizer out; then its codebooks are initialized by k-means of the hidden frames and follow them by moving
averages. Every second example is decoded from a random number of codebooks, so that a prefix of them gives speech too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import l1_loss

from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.encoder import EncoderLayout
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from batch_tokenizer.records import RunError, first_line
from batch_tokenizer.storage.atomic import atomic_write
from batch_tokenizer.training.codebooks import CodebookTrainer, Quantized, perplexity
from batch_tokenizer.training.discriminators import Adversary
from batch_tokenizer.training.losses import MIN_LEVEL, SpectralLoss
from batch_tokenizer.training.recipe import Recipe
from batch_tokenizer.training.starting import MEL_DEVIATION, MEL_MEAN, make_model, start_from

#: Learning rate of the discriminators, and the steps over which the weight of their losses rises to its full value.
ADVERSARY_LEARNING_RATE, ADVERSARY_WARMUP = 4e-4, 600

#: Hidden frames that initialize the codebooks, at most.
K_MEANS_FRAMES = 16384


class Trainer:
    """A model in training with its optimizer, codebooks, discriminators, averaged weights and step count."""

    def __init__(self, recipe: Recipe) -> None:
        """
        Raises:
            RunError: the recipe's config cannot be trained.
        """
        self.recipe = recipe
        self.config = MiMoConfig.from_json(recipe.config)
        if self.config.stride_size != self.config.decoder_stride_size:
            raise RunError("config.json: decoder_stride_size must equal stride_size, or the output has another length")
        self.device = torch.device(recipe.device)
        self.model = make_model(self.config, recipe.seed).to(self.device)
        self.codebooks = CodebookTrainer(self.model.encoder.quantizer).to(self.device)
        self.loss = SpectralLoss(self.config.sampling_rate).to(self.device)
        self.adversary = Adversary(ADVERSARY_LEARNING_RATE).to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
            lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True,
        )  # fmt: skip
        self.step = 0
        self.seconds = 0.0
        self.finished = False  # all steps done and levels calibrated
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self._hidden: list[Tensor] = []  # of the steps before the codebooks are initialized
        self._coarse: list[Tensor] = []
        assert self.model.decoder is not None
        self.model.decoder.dconv2.register_forward_hook(self._keep_coarse)

    def start_from(self, folder: str, utterances: Sequence[Tensor]) -> None:
        """Loads initial weights from a checkpoint; ``utterances`` are samples (S,) to measure statistics on."""
        mels = [torch.from_numpy(log_mel(samples.numpy(), self.config.mel)).to(self.device) for samples in utterances]
        start_from(self.model, self.config, folder, mels)
        torch._foreach_copy_(self.average, [p.detach() for p in self.model.parameters()])

    @property
    def progress(self) -> float:
        """Share of the run that is done, from 0 to 1."""
        return min(1.0, max(self.step / self.recipe.steps, self.seconds / (60 * self.recipe.minutes)))

    @property
    def seconds_left(self) -> float:
        """Seconds until the end of the run at the average speed so far."""
        return self.seconds * (1 / max(self.progress, 1e-6) - 1)

    def learning_rate(self) -> float:
        """Learning rate of the current step: linear warmup, then half a cosine down to 1 %."""
        rise = min(1.0, (self.step + 1) / self.recipe.warmup)
        return self.recipe.learning_rate * rise * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def _keep_coarse(self, _: torch.nn.Module, __: Any, output: tuple[Tensor, Any]) -> None:
        self._coarse = [output[0]]

    def reconstruct(self, mels: Tensor, used: Tensor) -> tuple[Tensor, Quantized]:
        """Log-mel (B, n_mels, L) of equal length to samples (B, S'), example b decoded from ``used[b]`` codebooks."""
        batch, _, frames = mels.shape
        layout = EncoderLayout.build(self.config, [frames] * batch, self.device)
        rows = layout.mel.scatter(mels.transpose(1, 2).flatten(0, 1))
        hidden = layout.tokens.gather(self.model.encoder(rows, layout))
        lengths = layout.tokens.lengths.tolist()
        if self.codebooks.ready:
            quantized = self.codebooks(hidden, used.repeat_interleave(lengths[0]))
        else:
            quantized = Quantized(rows=hidden, commitment=hidden.new_zeros(()))
            self._hidden.append(hidden.detach())
        assert self.model.decoder is not None
        samples, _ = self.model.decoder(quantized.rows, lengths)
        return samples.unflatten(0, (batch, -1)), quantized

    def train_step(self, samples: Tensor, mels: Tensor, targets: Tensor) -> dict[str, float]:
        """One optimization step. Returns the loss and its parts.

        Args:
            samples: float32 (B, S), the crops.
            mels: float32 (B, n_mels, L), their log-mel.
            targets: float32 (B, n_mels, L), what the coarse mel is compared with.
        """
        # 1. Initialize the codebooks once the encoder has settled.
        first = min(self.recipe.quantize_from, self.recipe.steps // 2)
        if self.step >= first and self._hidden and not self.codebooks.ready:
            self.codebooks.start(torch.cat(self._hidden))
        most = max(1, K_MEANS_FRAMES // (len(mels) * self.recipe.token_frames))
        self._hidden = [] if self.codebooks.ready else self._hidden[-most:]

        # 2. Forward pass and spectral losses.
        self.model.train()
        self.codebooks.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        output, quantized = self.reconstruct(mels, self._draw_used(len(samples)))
        output = output[:, : samples.shape[1]]
        loss, parts = self.loss(output, samples, self.step)

        # 3. The decoder's coarse mel, which the vocoder turns into samples, is compared with the log-mel itself.
        # Encoder and decoder learn many times faster from it than through the vocoder.
        coarse = self._coarse.pop().unflatten(0, (len(mels), -1)).transpose(1, 2)
        parts["coarse"] = l1_loss(coarse, (targets - MEL_MEAN) / MEL_DEVIATION)
        loss = loss + self.recipe.coarse_weight * parts["coarse"]
        loss = loss + self.recipe.commitment_weight * quantized.commitment
        if self.progress >= self.recipe.adversarial_from:
            loss = loss + self._adversarial(output, samples, parts)

        # 4. Update; a step whose gradient is not finite is skipped.
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        self._update_average()
        named = {"loss": loss, **parts, "commitment": quantized.commitment, "gradient": norm}
        return {name: float(value.detach()) for name, value in named.items()}

    def _adversarial(self, output: Tensor, samples: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """One step of the discriminators, and the model's adversarial loss with its warmup."""
        output, samples = self.adversary.excerpts(output, samples)
        parts["discriminators"], features = self.adversary.learn(output, samples, self.step)
        parts["adversarial"], parts["features"] = self.adversary.generator_losses(output, features, self.step)
        self.adversary.steps += 1
        growth = min(1.0, float(self.adversary.steps) / ADVERSARY_WARMUP)
        return growth * (
            self.recipe.adversarial_weight * parts["adversarial"] + self.recipe.feature_weight * parts["features"]
        )

    @torch.no_grad()
    def _update_average(self) -> None:
        """Moves the averaged weights towards the current ones, every tenth step for all ten."""
        if self.step % 10 == 0:
            share = 1 - (1 - 1 / min(self.recipe.average_over, max(10, self.step / 4))) ** 10
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], share)

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Context in which the model has its averaged weights."""
        parameters: list[Tensor] = list(self.model.parameters())
        current = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, current)

    def _draw_used(self, batch: int) -> Tensor:
        """int64 (B,): codebooks to decode each example from, all of them or, with a chance of one half, any number."""
        most = self.config.num_quantizers
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        some = torch.randint(1, most + 1, (batch,), generator=generator)
        every = torch.rand(batch, generator=generator) < 0.5
        return torch.where(every, most, some).to(self.device)

    @torch.no_grad()
    def score(self, utterances: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, Any]:
        """Scores of the averaged weights on held-out utterances, samples (S,) each, for each number of codebooks.

        ``envelope_N`` is the correlation of band envelopes at N codebooks. It follows STOI (rank correlation 0.98 over
        28 pairs), while the training loss does not. ``level_N`` is the mean change of level in dB. ``perplexity`` is
        that of each codebook.
        """
        self.model.eval()
        result: dict[str, Any] = {}
        with self.averaged():
            mels = [torch.from_numpy(log_mel(utterance.numpy(), self.config.mel)) for utterance in utterances]
            codes = self.model.encode_utterances([mel.to(self.device) for mel in mels])
            for number in numbers:
                outputs = self.model.decode_utterances([code[:, :number] for code in codes])
                pairs = [
                    _unit_level(output, utterance.to(self.device))
                    for output, utterance in zip(outputs, utterances, strict=True)
                ]
                envelopes = [1 - float(self.loss.envelope(*pair)) for pair in pairs]
                levels = [20 * math.log10(max(float(output.square().mean().sqrt()), 1e-6)) for output, _ in pairs]
                result[f"envelope_{number}"] = round(sum(envelopes) / len(pairs), 4)
                result[f"level_{number}"] = round(sum(levels) / len(pairs), 2)
        every = torch.cat(codes)
        result["perplexity"] = [
            round(perplexity(every[:, k], size), 1) for k, size in enumerate(self.config.codebook_size)
        ]
        return result

    @torch.no_grad()
    def calibrate(self, utterances: Sequence[Tensor]) -> float:
        """Shifts the vocoder's log-magnitudes so that utterances, samples (S,), keep their level on average.

        Losses on magnitudes leave uncertain ones about 1 dB too quiet.

        Returns:
            the shift in dB.
        """
        assert self.model.decoder is not None
        with self.averaged():
            changes = []
            for utterance in utterances:
                mel = torch.from_numpy(log_mel(utterance.numpy(), self.config.mel)).to(self.device)
                (output,) = self.model.decode_utterances(self.model.encode_utterances([mel]))
                output, original = _unit_level(output, utterance.to(self.device))
                if original.square().mean() > 0.5:  # not silence
                    changes.append(0.5 * float(output.square().mean().clamp(min=1e-6).log()))
        change = sum(changes) / max(1, len(changes))
        bias = self.model.decoder.vocoder.head.out.bias
        index = [name for name, _ in self.model.named_parameters()].index("decoder.vocoder.head.out.bias")
        for tensor in (bias, self.average[index]):
            tensor[: len(tensor) // 2] -= change
        return -20 / math.log(10) * change

    def save(self) -> None:
        """Writes ``state.pt``, from which the run resumes, and ``checkpoint/`` with the averaged weights.

        Raises:
            RunError: they cannot be written.
        """
        state = {
            "config": dict(self.recipe.config),
            "model": self.model.state_dict(),
            "codebooks": self.codebooks.state_dict(),
            "hidden": self._hidden,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "adversary": self.adversary.state_dict(),
            "adversary_optimizer": self.adversary.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "finished": self.finished,
            "random": torch.get_rng_state(),
        }
        out = self.recipe.out
        try:
            with atomic_write(out / "state.pt") as file:
                torch.save(state, file)
            with self.averaged():
                export(self.model, self.recipe.config, out / "checkpoint")
        except (OSError, RuntimeError) as error:  # torch turns errors of the disk into RuntimeError
            remedy = "make room and start the same command again"
            raise RunError(f"{out}: cannot be written: {first_line(error)}; {remedy}", exit_code=1) from error

    def resume(self) -> bool:
        """Loads the state in the run folder. Returns whether there is one.

        Raises:
            RunError: the state is of another config, or cannot be read.
        """
        path = self.recipe.out / "state.pt"
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, UnpicklingError) as error:
            reason = first_line(error) if isinstance(error, OSError) else "is damaged"
            raise RunError(f"{path}: {reason}; remove it to train from the start") from error
        if state["config"] != dict(self.recipe.config):
            raise RunError(f"{path}: is of another config; choose another --out, or the same config")
        self.model.load_state_dict(state["model"])
        self.codebooks.load_state_dict(state["codebooks"])
        self._hidden = [frames.to(self.device) for frames in state.get("hidden", [])]
        self.optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(self.average, state["average"])
        self.adversary.load_state_dict(state["adversary"])
        self.adversary.optimizer.load_state_dict(state["adversary_optimizer"])
        self.step, self.seconds, self.finished = state["step"], state["seconds"], state.get("finished", False)
        torch.set_rng_state(state["random"])
        return True


def export(model: MiMoAudioTokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """Writes a checkpoint folder: parameters in half precision, buffers (codebooks, window) in float32.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.half() if name in parameters else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_write(folder / "config.json") as file:
        file.write((json.dumps(dict(config), indent=1) + "\n").encode())
    with atomic_write(folder / "model.safetensors") as file:
        file.write(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def _unit_level(output: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Both (1, S), as long as the shorter one, divided by the original's root mean square."""
    length = min(len(output), len(original))
    level = original[:length].square().mean().sqrt().clamp(min=MIN_LEVEL)
    return output[None, :length] / level, original[None, :length] / level
