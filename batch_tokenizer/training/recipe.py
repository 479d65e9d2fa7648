"""The recipe: random crops go through encoder, quantizer and decoder; spectra are compared; a checkpoint comes out.

    crops ──► AudioEncoder ──► codebooks (straight-through) ──► AudioDecoder ──► samples ──► SpectralLoss
                                    └► commitment                    └► coarse mel ──► L1

The model's own modules are trained, so what is exported is what ``--model_path`` runs. For the first steps the
quantizer is left out; then its codebooks start from k-means of the hidden frames and follow them by moving averages.
Every other example is decoded from a random number of codebooks, so that fewer codebooks than all give speech too.

A run may be stopped at any moment, by a signal or its limits, with its state and a usable checkpoint on disk. Started
again with the same folder it resumes, with the data that it had not seen.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import l1_loss
from torch.utils.data import DataLoader

from batch_tokenizer.audio.loading import load_samples
from batch_tokenizer.audio.mel import log_mel
from batch_tokenizer.codecs.mimo.config import MiMoConfig
from batch_tokenizer.codecs.mimo.encoder import EncoderLayout
from batch_tokenizer.codecs.mimo.model import MiMoAudioTokenizer
from batch_tokenizer.records import RowError, RunError
from batch_tokenizer.storage.atomic import atomic_write
from batch_tokenizer.training.augmentation import Augmentation
from batch_tokenizer.training.codebooks import CodebookTrainer, Quantized, perplexity
from batch_tokenizer.training.crops import Audio, Crops, Numbers, crop_length, read_manifest
from batch_tokenizer.training.discriminators import Adversary
from batch_tokenizer.training.losses import LEAST_LEVEL, SpectralLoss
from batch_tokenizer.training.starting import MEL_DEVIATION, MEL_MEAN, make_model, start_from

log = logging.getLogger(__name__)

#: The shape of the bundled default checkpoint. Bounded windows let a model trained on short crops take long audio.
SMALL: Mapping[str, Any] = {
    "model_type": "mimo_audio_tokenizer",
    "sampling_rate": 24000,
    "hop_length": 480,
    "nfft": 960,
    "window_size": 960,
    "n_mels": 128,
    "fmin": 0,
    "fmax": 8000,
    "d_model": 128,
    "kernel_size": 3,
    "stride_size": 1,
    "avg_pooler": 2,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "encoder_skip_layer_id": 2,
    "encoder_causal": False,
    "encoder_attn_window_size": [24, 24],
    "num_quantizers": 20,
    "codebook_size": [256, 256, 128],
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 512,
    "decoder_causal": True,
    "decoder_attn_window_size": [48, 0],
    "decoder_kernel_size": 3,
    "decoder_stride_size": 1,
    "vocoder_dim": 192,
    "vocoder_num_layers": 7,
    "vocoder_attention_heads": 4,
    "vocoder_intermediate_dim": 768,
    "vocoder_attn_window_size": [40, 10],
    "vocoder_padding": "same",
    "rope_theta": 10000,
    "rope_type": "default",
    "ln_type": "LayerNorm",
    "activation_function": "gelu",
    "max_audio_seconds": 1800,
}

#: Of the discriminators, and the steps over which their part of the loss grows.
ADVERSARY_LEARNING_RATE, ADVERSARY_WARMUP = 4e-4, 600


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run of training is asked for.

    Attributes:
        data: manifest of the audio to learn from.
        out: folder of the run: ``state.pt``, ``log.jsonl`` and ``checkpoint/``.
        held_out: manifest of audio to watch, never learned from; None for none.
        config: the model's ``config.json``.
        start_from: checkpoint whose weights training begins with; None for random ones.
        average_over: steps over which the exported weights are averaged, about.
        steps, minutes: the run ends at whichever comes first; the learning rate falls to zero towards it.
        batch_size: crops a step.
        token_frames: length of a crop, in frames of tokens.
        learning_rate: of AdamW at its peak, after ``warmup`` steps.
        quantize_from: the step at which the quantizer is put in.
        coarse_weight, commitment_weight: of the coarse mel's and of the codebooks' part of the loss.
        adversarial_from: share of the run after which the discriminators take part.
        adversarial_weight, feature_weight: of their scores' and their features' parts of the loss.
        augmentation: how examples are varied.
        seed: of the model, the order of the data and all random choices.
        device: torch's name of it.
        num_workers: processes that load crops.
        cache_gib: memory that each of them may keep audio in.
        log_every: steps between two lines of the log.
        save_every: seconds between two saves.
    """

    data: Path | str
    out: Path
    held_out: Path | str | None = None
    config: Mapping[str, Any]
    start_from: str | None = None
    average_over: int = 1000
    steps: int = 40000
    minutes: float = math.inf
    batch_size: int = 4
    token_frames: int = 32
    learning_rate: float = 1.2e-3
    warmup: int = 200
    quantize_from: int = 130
    coarse_weight: float = 2.0
    commitment_weight: float = 0.5
    adversarial_from: float = 0.6
    adversarial_weight: float = 0.1
    feature_weight: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 1986
    device: str = "cpu"
    num_workers: int = 1
    cache_gib: float = 4.0
    log_every: int = 50
    save_every: float = 300.0


class Trainer:
    """One run of training: the model, its optimizer, its codebooks, and how far it has come."""

    def __init__(self, recipe: Recipe) -> None:
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
        self.average = [p.detach().clone() for p in self.model.parameters()]
        self._hidden: list[Tensor] = []
        self._coarse: list[Tensor] = []
        assert self.model.decoder is not None
        self.model.decoder.dconv2.register_forward_hook(self._keep_coarse)

    def start_from(self, folder: str, utterances: Sequence[Tensor]) -> None:
        """Begins with the weights of a checkpoint; ``utterances`` are samples (S,) to measure statistics on."""
        mels = [torch.from_numpy(log_mel(samples.numpy(), self.config.mel)).to(self.device) for samples in utterances]
        start_from(self.model, self.config, folder, mels)
        torch._foreach_copy_(self.average, [p.detach() for p in self.model.parameters()])

    @property
    def progress(self) -> float:
        """How much of the run is over, from 0 to 1."""
        return min(1.0, max(self.step / self.recipe.steps, self.seconds / (60 * self.recipe.minutes)))

    @property
    def seconds_left(self) -> float:
        """Until the end of the run, at the speed so far."""
        return self.seconds * (1 / max(self.progress, 1e-6) - 1)

    def learning_rate(self) -> float:
        """Up in a line, down in half a cosine."""
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
        """One step on B of ``Crops``: samples (B, S), two log-mels (B, n_mels, L). The loss and its parts."""
        # 1. Codebooks start from the hidden frames of the last steps without them.
        if self.step >= self.recipe.quantize_from and not self.codebooks.ready and self._hidden:
            self.codebooks.start(torch.cat(self._hidden))
        most = max(1, 16384 // (len(mels) * self.recipe.token_frames))
        self._hidden = [] if self.codebooks.ready else self._hidden[-most:]
        self.model.train()
        self.codebooks.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        # 2. Forward, and the loss.
        made, quantized = self.reconstruct(mels, self._draw_used(len(samples)))
        loss, parts = self.loss(made[:, : samples.shape[1]], samples, self.step)
        # What the vocoder is given is held to the log-mel itself: encoder and decoder learn from it many times faster
        # than through the vocoder, which meanwhile learns its own part.
        coarse = self._coarse.pop().unflatten(0, (len(mels), -1)).transpose(1, 2)
        parts["coarse"] = l1_loss(coarse, (targets - MEL_MEAN) / MEL_DEVIATION)
        loss = loss + self.recipe.coarse_weight * parts["coarse"]
        loss = loss + self.recipe.commitment_weight * quantized.commitment
        if self.progress >= self.recipe.adversarial_from:
            loss = loss + self._adversarial(made[:, : samples.shape[1]], samples, parts)
        # 3. Backward. A step whose gradient is not finite is skipped.
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        self._average()
        named = {"loss": loss, **parts, "commitment": quantized.commitment, "gradient": norm}
        return {name: float(value.detach()) for name, value in named.items()}

    def _adversarial(self, made: Tensor, samples: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """One step of the discriminators; returns the adversarial loss, which grows over the first steps."""
        made, samples = self.adversary.excerpts(made, samples)
        parts["discriminators"], features = self.adversary.learn(made, samples, self.step)
        parts["adversarial"], parts["features"] = self.adversary.generator_losses(made, features, self.step)
        self.adversary.steps += 1
        growth = min(1.0, float(self.adversary.steps) / ADVERSARY_WARMUP)
        return growth * (
            self.recipe.adversarial_weight * parts["adversarial"] + self.recipe.feature_weight * parts["features"]
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the average of the weights towards them, every tenth step for all ten."""
        if self.step % 10 == 0:
            share = 1 - (1 - 1 / min(self.recipe.average_over, max(10, self.step / 4))) ** 10
            torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], share)

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Within it, the model has the averages of its weights."""
        parameters: list[Tensor] = list(self.model.parameters())
        current = [p.detach().clone() for p in parameters]
        torch._foreach_copy_(parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, current)

    def _draw_used(self, batch: int) -> Tensor:
        """Codebooks to decode each example from: all of them, or for every other one any number."""
        most = self.config.num_quantizers
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.step)
        some = torch.randint(1, most + 1, (batch,), generator=generator)
        every = torch.rand(batch, generator=generator) < 0.5
        return torch.where(every, most, some).to(self.device)

    @torch.no_grad()
    def watch(self, utterances: Sequence[Tensor], numbers: Sequence[int]) -> dict[str, Any]:
        """What the averaged weights make of whole held-out utterances, samples (S,) each, by number of codebooks.

        ``envelope_N`` is the guide: the correlation of band envelopes at N codebooks, which goes up and down with STOI
        (rank correlation 0.98 over 28 pairs). ``level_N`` is the mean change of level in dB. Then codebook use.
        """
        self.model.eval()
        result: dict[str, Any] = {}
        with self.averaged():
            mels = [torch.from_numpy(log_mel(utterance.numpy(), self.config.mel)) for utterance in utterances]
            codes = self.model.encode_utterances([mel.to(self.device) for mel in mels])
            for number in numbers:
                made = self.model.decode_utterances([code[:, :number] for code in codes])
                pairs = [
                    _unit_level(ours, theirs.to(self.device)) for ours, theirs in zip(made, utterances, strict=True)
                ]
                envelopes = [1 - float(self.loss.envelope(*pair)) for pair in pairs]
                levels = [20 * math.log10(max(float(ours.square().mean().sqrt()), 1e-6)) for ours, _ in pairs]
                result[f"envelope_{number}"] = round(sum(envelopes) / len(pairs), 4)
                result[f"level_{number}"] = round(sum(levels) / len(pairs), 2)
        every = torch.cat(codes)
        result["perplexity"] = [
            round(perplexity(every[:, k], size), 1) for k, size in enumerate(self.config.codebook_size)
        ]
        return result

    @torch.no_grad()
    def calibrate(self, utterances: Sequence[Tensor]) -> float:
        """Shifts all log-magnitudes so that utterances, samples (S,), keep their level on average. By how many dB.

        Losses of magnitudes leave what is uncertain about 1 dB too quiet.
        """
        assert self.model.decoder is not None
        with self.averaged():
            changes = []
            for utterance in utterances:
                mel = torch.from_numpy(log_mel(utterance.numpy(), self.config.mel)).to(self.device)
                (made,) = self.model.decode_utterances(self.model.encode_utterances([mel]))
                made, original = _unit_level(made, utterance.to(self.device))
                if original.square().mean() > 0.5:  # not of silence
                    changes.append(0.5 * float(made.square().mean().clamp(min=1e-6).log()))
        change = sum(changes) / max(1, len(changes))
        bias = self.model.decoder.vocoder.head.out.bias
        index = [name for name, _ in self.model.named_parameters()].index("decoder.vocoder.head.out.bias")
        for tensor in (bias, self.average[index]):
            tensor[: len(tensor) // 2] -= change
        return -20 / math.log(10) * change

    def save(self) -> None:
        """Writes ``state.pt``, from which the run resumes, and ``checkpoint``, which ``--model_path`` takes."""
        state = {
            "config": dict(self.recipe.config),
            "model": self.model.state_dict(),
            "codebooks": self.codebooks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "adversary": self.adversary.state_dict(),
            "adversary_optimizer": self.adversary.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
        }
        with atomic_write(self.recipe.out / "state.pt") as file:
            torch.save(state, file)
        with self.averaged():
            export(self.model, self.recipe.config, self.recipe.out / "checkpoint")

    def resume(self) -> bool:
        """Loads the state in the run's folder; False if there is none.

        Raises:
            RunError: the state is of another model.
        """
        path = self.recipe.out / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["config"] != dict(self.recipe.config):
            raise RunError(f"{path}: is of a run with another config; choose another --out, or use the same config")
        self.model.load_state_dict(state["model"])
        self.codebooks.load_state_dict(state["codebooks"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(self.average, state["average"])
        if "adversary" in state:
            self.adversary.load_state_dict(state["adversary"])
            self.adversary.optimizer.load_state_dict(state["adversary_optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        torch.set_rng_state(state["random"])
        return True


def export(model: MiMoAudioTokenizer, config: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint folder: parameters in half precision, buffers (codebooks, window) as they are."""
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


def _unit_level(made: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Both (1, S), as long as the shorter, divided by the original's root mean square."""
    length = min(len(made), len(original))
    level = original[:length].square().mean().sqrt().clamp(min=LEAST_LEVEL)
    return made[None, :length] / level, original[None, :length] / level


def load_held_out(source: Path | str, folder: Path, config: MiMoConfig, most: int = 8) -> list[Tensor]:
    """Up to ``most`` utterances of at least half a second, spread evenly over a manifest, four seconds of each at most.

    Raises:
        RunError: the manifest cannot be read, or none of those files can.
    """
    files = [file for file in read_manifest(source, folder) if file.seconds >= 0.5]
    utterances = []
    for file in files[:: max(1, len(files) // most)][:most]:
        try:
            samples = load_samples(file.path, config.sampling_rate, cut=file.cut)
        except RowError as error:
            log.warning("not watched: %s", error.reason)
            continue
        utterances.append(torch.from_numpy(samples[: 4 * config.sampling_rate]))
    if not utterances:
        raise RunError(f"{source}: no file of at least half a second can be read")
    return utterances


def train(recipe: Recipe, stop: Callable[[], bool] = lambda: False) -> Trainer:
    """Runs a recipe to its end, or until ``stop()`` says so after a step. Saves at the end and in between.

    Raises:
        RunError: the data or the config cannot be used, or the state in ``out`` is of another model.
    """
    # 1. The model, the audio, and the state of an earlier start.
    recipe.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(recipe)
    config = trainer.config
    audio = Audio(read_manifest(recipe.data, recipe.out), config.sampling_rate, int(recipe.cache_gib * 2**30))
    watched = load_held_out(recipe.held_out, recipe.out, config) if recipe.held_out else []
    numbers = sorted({min(n, config.num_quantizers) for n in (4, 8, config.num_quantizers)})
    if trainer.resume():
        log.info("resumed at step %d, after %.1f minutes", trainer.step, trainer.seconds / 60)
    elif recipe.start_from is not None:
        trainer.start_from(recipe.start_from, load_held_out(recipe.data, recipe.out, config, 16))
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    log.info("%.2f M parameters, %d files, %s", count / 1e6, len(audio), trainer.device)
    # 2. Crops by number, from the first one that no earlier step has seen.
    loader = DataLoader(
        Crops(audio, config, recipe.token_frames, recipe.seed, recipe.augmentation),
        batch_sampler=Numbers(trainer.step, recipe.batch_size), num_workers=recipe.num_workers,
        prefetch_factor=4 if recipe.num_workers else None, worker_init_fn=_ignore_signals,
    )  # fmt: skip
    seconds_per_step = recipe.batch_size * crop_length(config, recipe.token_frames) / config.sampling_rate
    sums: dict[str, float] = {}
    counted = 0
    clock = saved = time.monotonic()
    # 3. Steps, with a line of the log and a save now and then.
    with _report_lost_loaders():
        for crops in loader:
            if trainer.progress >= 1 or stop():
                break
            for name, value in trainer.train_step(*(part.to(trainer.device) for part in crops)).items():
                sums[name] = sums.get(name, 0.0) + value
            counted += 1
            now = time.monotonic()
            trainer.seconds += now - clock
            clock = now
            if trainer.step % recipe.log_every == 0:
                line: dict[str, Any] = {name: round(value / counted, 4) for name, value in sums.items()}
                hours = round(trainer.step * seconds_per_step / 3600, 2)
                _log(
                    recipe.out,
                    {
                        "step": trainer.step,
                        "minutes": round(trainer.seconds / 60, 1),
                        "minutes_left": round(trainer.seconds_left / 60, 1),
                        "hours": hours,
                        **line,
                    },
                )
                sums, counted = {}, 0
            if now - saved >= recipe.save_every:
                trainer.save()
                if watched and trainer.codebooks.ready:
                    _log(recipe.out, {"step": trainer.step, "held_out": trainer.watch(watched, numbers)})
                saved = time.monotonic()
    # 4. At the end, but not after a stop: the level of the output, and a last look at the held-out audio.
    if trainer.progress >= 1 and trainer.codebooks.ready:
        log.info("levels shifted by %.2f dB", trainer.calibrate(load_held_out(recipe.data, recipe.out, config, 32)))
    trainer.save()
    if watched and trainer.codebooks.ready and trainer.progress >= 1:
        _log(recipe.out, {"step": trainer.step, "held_out": trainer.watch(watched, numbers)})
    return trainer


def _ignore_signals(_: int) -> None:
    """A signal to the whole job must not end the loaders before the last step is saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _report_lost_loaders() -> Iterator[None]:
    """
    Raises:
        RunError: one of the loader's processes ended, which torch raises from a signal handler, at any place.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunError(
            "a loading process ended, as when memory runs out (--cache_gib, --num_workers); start the same command "
            "again to go on from the last save",
            exit_code=1,
        ) from error


def _log(out: Path, line: Mapping[str, Any]) -> None:
    text = json.dumps(dict(line))
    log.info("%s", text)
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(text + "\n")
