"""Short clips for a speech recognizer: speech synthesized by eSpeak NG, or your own recordings.

`load_synthetic` makes clips of digits and commands in many voices. `clips_of_folder` reads your own
recordings: pairs of NAME.wav and NAME.txt. Both hold out whole speakers for validation. `log_mel`
computes the features of a clip.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import tempfile
import unicodedata
import wave
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

SAMPLE_RATE = 16_000  # of every Clip, in Hz

# The features of Whisper (Radford et al., 2022), in samples at SAMPLE_RATE.
WINDOW = 400
HOP = 160
MELS = 80

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = ("yes", "no", "up", "down", "left", "right", "stop", "go", "on", "off")
DIGIT_SHARE = 0.6  # share of clips with digits; the others have commands
MOST_WORDS = 3

# "en" is British English. A speaker is an accent and a voice, in eSpeak NG's notation: en-us+f2.
ACCENTS = ("en-us", "en-us-nyc", "en", "en-gb-x-rp", "en-gb-scotland", "en-gb-x-gbclan", "en-029")
TRAINING_VOICES = ("m1", "m3", "m5", "m6", "m7", "m8", "Alex", "Michael", "max", "grandpa")
TRAINING_VOICES += ("f1", "f3", "f4", "Andrea", "Annie", "linda", "steph", "grandma")
HELD_OUT_VOICES = ("m2", "m4", "f2", "f5")  # never used in training, with any accent

SPEED = (160, 240)  # words per minute
PITCH = (35, 65)  # eSpeak NG's scale, 0 to 100; 50 is the voice's normal pitch
PITCH_RANGE = (30, 70)  # the same scale; how much the pitch varies
SIGNAL_TO_NOISE = (10.0, 40.0)  # dB
PEAK = (-20.0, -1.0)  # dB relative to full scale
SILENCE = 0.005  # share of the peak; quieter sound at both ends is cut off
MARGIN = SAMPLE_RATE // 20  # 50 ms of the cut-off sound are kept

HOLD_OUT_EVERY = 8  # every eighth speaker of a user, or clip if there is one speaker
LONGEST = 30  # seconds; longer recordings are refused

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """Recorded or synthesized speech: float32 mono samples in [-1, 1] at 16 kHz, text, speaker."""

    samples: np.ndarray
    text: str
    speaker: str


# ---- Features


def log_mel(samples: np.ndarray) -> np.ndarray:
    """Whisper's log-mel spectrogram, (samples // 160, 80), float32, about in [-1, 1].

    Shorter clips are padded with zeros to 201 samples, so there is at least one frame.
    """
    samples = np.pad(samples, (0, max(0, WINDOW // 2 + 1 - len(samples))))
    centred = np.pad(samples, WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(centred, WINDOW)[::HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)  # periodic
    power = np.abs(np.fft.rfft(frames[: len(samples) // HOP] * hann)) ** 2
    decades = np.log10(np.maximum(power @ mel_filters(), 1e-10))
    decades = np.maximum(decades, decades.max() - 8)
    return ((decades + 4) / 4).astype(np.float32)


@cache
def mel_filters() -> np.ndarray:
    """Triangular filters on Slaney's mel scale, (201, 80). The area of each, over Hz, is 1.

    Equal to `librosa.filters.mel(sr=16000, n_fft=400, n_mels=80).T`.
    """
    frequencies = np.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)[:, None]
    highest = 15 + 27 * math.log(SAMPLE_RATE / 2 / 1000, 6.4)  # in mel
    mels = np.linspace(0, highest, MELS + 2)
    # Slaney's scale: linear up to 1 kHz (15 mel), then 27 mel for each factor of 6.4.
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies - left) / (centre - left)
    falling = (right - frequencies) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resample from `rate` Hz to 16 kHz, band-limited, in the frequency domain."""
    if rate == SAMPLE_RATE:
        return samples.astype(np.float32)
    divisor = math.gcd(rate, SAMPLE_RATE)
    # Whole blocks keep the ratio exact. A block of silence keeps the end out of the start.
    blocks = -(-len(samples) * divisor // rate) + 1
    length = blocks * rate // divisor
    spectrum = np.fft.rfft(samples, length)
    resampled_length = blocks * SAMPLE_RATE // divisor
    resampled = np.fft.irfft(spectrum, resampled_length) * (resampled_length / length)
    return resampled[: round(len(samples) * SAMPLE_RATE / rate)].astype(np.float32)


# ---- Synthetic speech


def load_synthetic(
    folder: Path, training: int = 3000, validation: int = 300, seed: int = 1
) -> tuple[list[Clip], list[Clip]]:
    """Make `synthetic_clips` once and cache them in `folder`. A damaged cache is made again."""
    recipe = f"{Path(__file__).read_text('utf-8')} {training} {validation} {seed}"
    name = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    path = folder / f"synthetic-{name}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return read_cache(path)
    folder.mkdir(parents=True, exist_ok=True)  # first, because it may fail
    write_cache(path, *synthetic_clips(training, validation, seed))
    return read_cache(path)


def read_cache(path: Path) -> tuple[list[Clip], list[Clip]]:
    # If NumPy opened the file, it would leave a damaged one open.
    with path.open("rb") as stream, np.load(stream) as file:
        ends, training = np.cumsum(file["lengths"]), int(file["training"])
        samples = np.split(file["samples"].astype(np.float32) / 2**15, ends[:-1])
        texts, speakers = file["texts"].tolist(), file["speakers"].tolist()
    clips = [Clip(*fields) for fields in zip(samples, texts, speakers, strict=True)]
    return clips[:training], clips[training:]


def write_cache(path: Path, training: list[Clip], validation: list[Clip]) -> None:
    clips = training + validation
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        np.savez(
            temporary,
            samples=np.concatenate([to_int16(clip.samples) for clip in clips]),
            lengths=np.array([len(clip.samples) for clip in clips]),
            texts=np.array([clip.text for clip in clips]),
            speakers=np.array([clip.speaker for clip in clips]),
            training=np.array(len(training)),
        )
        os.replace(temporary, path)  # atomic, because another process may write it too


def synthetic_clips(training: int, validation: int, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Make clips of one to three words, in training voices and in held-out voices.

    The first call in a process gives the same clips for the same seed. Later calls differ in
    vibrato, because eSpeak NG keeps its phase.

    Raises:
        RuntimeError: If eSpeak NG is missing or fails.
    """
    synthesizer = Synthesizer(seed)
    streams = (
        islice(endless_clips(synthesizer, voices, (seed, part)), count)
        for part, (voices, count) in enumerate(
            [(TRAINING_VOICES, training), (HELD_OUT_VOICES, validation)]
        )
    )
    total = training + validation
    clips = list(tqdm(chain(*streams), "synthesizing speech", total, unit="clip"))
    return clips[:training], clips[training:]


def endless_clips(
    synthesizer: Synthesizer, voices: Sequence[str], seed: tuple[int, int]
) -> Iterator[Clip]:
    random = np.random.default_rng(seed)
    speakers = balanced(random, [f"{accent}+{voice}" for accent in ACCENTS for voice in voices])
    digits, commands = balanced(random, DIGITS), balanced(random, COMMANDS)
    while True:
        vocabulary = digits if random.random() < DIGIT_SHARE else commands
        words = list(islice(vocabulary, int(random.integers(1, MOST_WORDS, endpoint=True))))
        yield synthetic_clip(synthesizer, random, words, next(speakers))


def balanced(random: np.random.Generator, items: Sequence[str]) -> Iterator[str]:
    """Yield every item twice in random order, again and again. A word may follow itself."""
    while True:
        yield from random.permutation([*items, *items]).tolist()


def synthetic_clip(
    synthesizer: Synthesizer, random: np.random.Generator, words: list[str], speaker: str
) -> Clip:
    """Synthesize the words at a random speed, pitch and level, with white or pink noise."""
    speech = synthesizer(
        " ".join(words),
        speaker,
        speed=int(random.integers(*SPEED, endpoint=True)),
        pitch=int(random.integers(*PITCH, endpoint=True)),
        pitch_range=int(random.integers(*PITCH_RANGE, endpoint=True)),
    )
    speech = trimmed(speech)
    noise = white_or_pink(random, len(speech))
    ratio = 10 ** (random.uniform(*SIGNAL_TO_NOISE) / 10)
    noise *= math.sqrt(np.mean(speech**2) / np.mean(noise**2) / ratio)
    samples = speech + noise
    samples *= 10 ** (random.uniform(*PEAK) / 20) / np.abs(samples).max()
    return Clip(samples.astype(np.float32), " ".join(words), speaker)


def trimmed(speech: np.ndarray) -> np.ndarray:
    """Cut off silence at both ends, but keep a margin."""
    heard = np.flatnonzero(np.abs(speech) > SILENCE * np.abs(speech).max())
    return np.pad(speech, MARGIN)[heard[0] : heard[-1] + 1 + 2 * MARGIN]


def white_or_pink(random: np.random.Generator, length: int) -> np.ndarray:
    noise = random.normal(
        size=1 << length.bit_length()
    )  # a power of 2, because the FFT of primes is slow
    if random.random() < 0.5:
        return noise[:length]
    spectrum = np.fft.rfft(noise)
    spectrum /= np.sqrt(
        np.maximum(1, np.arange(len(spectrum)))
    )  # pink: power proportional to 1 / frequency
    return np.fft.irfft(spectrum)[:length]


class Synthesizer:
    """eSpeak NG through its C interface. Its state is global, so use one synthesizer at a time."""

    def __init__(self, seed: int) -> None:
        try:
            import espeakng_loader

            self.library = ctypes.CDLL(espeakng_loader.get_library_path())
            data = Path(espeakng_loader.get_data_path())
            self.library.espeak_ng_SetRandSeed  # noqa: B018, new in 1.52
        except (ImportError, OSError, RuntimeError, AttributeError) as problem:
            raise RuntimeError(
                f"eSpeak NG cannot be loaded ({problem}): pip install -U espeakng-loader, "
                "or train on your own recordings with --data DIR"
            ) from problem
        # 2: speak before returning; 0x8000: return errors rather than exit the process.
        self.rate = self.library.espeak_Initialize(2, 0, os.fsencode(data), 0x8000)
        if self.rate <= 0:
            raise RuntimeError(
                f"eSpeak NG does not start with {data}: if the path is longer than 159 characters, "
                "install it in a folder with a shorter path; or train with --data DIR"
            )
        # Without this check, eSpeak NG would use the accent's own voice for an unknown one.
        voices = (*TRAINING_VOICES, *HELD_OUT_VOICES)
        if missing := [v for v in voices if not (data / "voices" / "!v" / v).is_file()]:
            raise RuntimeError(f"eSpeak NG in {data} lacks the voices {', '.join(missing)}")
        self.library.espeak_ng_SetRandSeed(
            ctypes.c_long(seed)
        )  # seeds the breath noise; the default seed is the clock

        self.heard: list[bytes] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self.callback = callback(self.hear)  # keep a reference, because C does not count them
        self.library.espeak_SetSynthCallback(self.callback)

    def __call__(
        self, text: str, speaker: str, *, speed: int, pitch: int, pitch_range: int
    ) -> np.ndarray:
        """Synthesize untrimmed speech at 16 kHz."""
        self.heard.clear()
        library, utterance = self.library, text.encode()
        length = ctypes.c_size_t(len(utterance) + 1)
        utf_8 = 1
        self.check("SetVoiceByName", library.espeak_SetVoiceByName(speaker.encode()), speaker)
        for parameter, value in ((1, speed), (2, 100), (3, pitch), (4, pitch_range)):  # 2: volume
            self.check("SetParameter", library.espeak_SetParameter(parameter, value, 0), value)
        status = library.espeak_Synth(utterance, length, 0, 1, 0, utf_8, None, None)
        self.check("Synth", status, text)
        self.check("Synchronize", library.espeak_Synchronize(), text)
        samples = np.frombuffer(b"".join(self.heard), np.int16)
        if not samples.any():
            raise RuntimeError(f"eSpeak NG gave no sound for {text!r} by {speaker}")
        return resample(samples / 2**15, self.rate)

    def hear(self, samples: int | None, count: int, events: int | None) -> int:
        """Collect samples from eSpeak NG. Returning 0 lets it continue."""
        if samples:
            self.heard.append(ctypes.string_at(samples, 2 * count))
        return 0

    @staticmethod
    def check(function: str, status: int, value: object) -> None:
        """Raise if the status of an eSpeak NG function is an error."""
        if status:
            raise RuntimeError(f"eSpeak NG: espeak_{function} failed with {status} for {value!r}")


# ---- Your own recordings


def clips_of_folder(folder: Path) -> tuple[list[Clip], list[Clip]]:
    """Load pairs of NAME.wav and NAME.txt below `folder` as training and validation clips.

    The folder of a file names its speaker. Every eighth speaker is held out for validation. With
    only one speaker, every eighth clip is held out.

    Raises:
        ValueError: If any file cannot be used; the message lists every problem and its remedy.
    """
    problems: list[str] = []

    def attempt(read: Callable[[Path], T], path: Path, otherwise: T) -> T:
        try:
            return read(path)
        except ValueError as problem:
            problems.append(str(problem))
            return otherwise

    paths = [
        p for p in sorted(folder.rglob("*")) if p.suffix.lower() == ".wav" and p.name[0] != "."
    ]
    clips = [
        Clip(
            attempt(read_wav, path, np.zeros(0)),
            attempt(read_text, path.with_suffix(".txt"), ""),
            path.parent.relative_to(folder).as_posix(),
        )
        for path in paths
    ]
    if len(clips) < 2:
        problems.append(
            f"{folder}: {len(clips)} .wav files; put at least 2 below it, each NAME.wav with its "
            "text in NAME.txt"
        )
    if problems:
        raise ValueError("\n".join(problems))

    speakers = sorted({clip.speaker for clip in clips})
    held_out = set(speakers[::HOLD_OUT_EVERY])
    if len(speakers) == 1:
        training = [clip for i, clip in enumerate(clips) if i % HOLD_OUT_EVERY]
        return training, clips[::HOLD_OUT_EVERY]
    training = [clip for clip in clips if clip.speaker not in held_out]
    return training, [clip for clip in clips if clip.speaker in held_out]


def read_text(path: Path) -> str:
    """The text of a clip in lower case with single spaces."""
    try:
        text = unicodedata.normalize("NFC", path.read_text("utf-8-sig"))
        text = " ".join(text.lower().split())
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; write the words of the .wav into it") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{path}: cannot be read as UTF-8 text ({problem})") from None
    if not text:
        raise ValueError(
            f"{path}: empty; write the words of the .wav into it, or remove both files"
        )
    return text


def read_wav(path: Path) -> np.ndarray:
    """Read a PCM file of any rate, width and number of channels. Return samples as in a Clip."""
    try:
        with wave.open(str(path), "rb") as file:
            rate, width, channels = file.getframerate(), file.getsampwidth(), file.getnchannels()
            if width > 4:
                raise wave.Error(f"{8 * width} bits per sample")
            # The length in the header may be wrong, for example after writing to a pipe.
            data = file.readframes(LONGEST * rate + 1)
    except (OSError, EOFError, wave.Error) as problem:
        remedy = f"ffmpeg -i {path.name} -c:a pcm_s16le new.wav"
        raise ValueError(f"{path}: not a PCM file ({problem}); convert it: {remedy}") from None
    samples = from_pcm(data[: len(data) // (width * channels) * width * channels], width)
    samples = samples.reshape(-1, channels).mean(axis=1)
    if not len(samples) or not 1 <= rate <= 10**6:
        raise ValueError(f"{path}: contains no sound; record it again, or remove it")
    if len(samples) > LONGEST * rate:
        raise ValueError(f"{path}: longer than {LONGEST} s; cut it into shorter clips")
    return np.clip(resample(samples, rate), -1, 1)


def from_pcm(data: bytes, width: int) -> np.ndarray:
    """Convert little-endian samples of 1 to 4 bytes to floats in [-1, 1)."""
    if width == 1:  # 8-bit samples are unsigned, all others are signed
        return np.frombuffer(data, np.uint8).astype(np.float32) / 2**7 - 1
    words = np.zeros((len(data) // width, 4), np.uint8)
    words[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return (words.view("<i4")[:, 0] / 2**31).astype(np.float32)


def write_wav(path: Path, clip: Clip) -> None:
    """Write a clip as 16-bit PCM."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(to_int16(clip.samples).astype("<i2").tobytes())


def to_int16(samples: np.ndarray) -> np.ndarray:
    return np.clip(np.round(samples * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
