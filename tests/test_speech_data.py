"""The data of the speech example: features, synthetic speech, a user's own recordings."""

import hashlib
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import speech_data
from speech_data import Synthesizer, clips_of_folder, load_synthetic, log_mel, resample
from transformers import WhisperFeatureExtractor

pytestmark = pytest.mark.examples

RATE = speech_data.SAMPLE_RATE
SIGNALS = {
    "noise": np.random.default_rng(0).normal(0, 0.1, 16_100),
    "loud, then silence": np.r_[np.sin(np.arange(4000.0)), np.zeros(4000)],
    "one frame": np.random.default_rng(1).normal(0, 0.1, 201),
    "not a whole frame more": np.random.default_rng(2).normal(0, 0.1, 799),
}


# ---- Features


@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel_equals_whispers_features(name):
    features = log_mel(SIGNALS[name])
    assert (features.dtype, features.shape) == (np.float32, (len(SIGNALS[name]) // 160, 80))
    extract = WhisperFeatureExtractor()
    theirs = extract(SIGNALS[name], sampling_rate=RATE, padding=False, return_tensors="np")
    # transformers keeps spectra in complex64: 2e-6 on noise, 4e-5 eight decades below a tone.
    expected = theirs["input_features"][0].T
    np.testing.assert_allclose(features, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("length", [0, 1, 159, 200])
def test_log_mel_pads_clips_too_short_to_reflect(length):
    features = log_mel(np.full(length, 0.5, np.float32))
    assert features.shape == (1, 80)
    assert np.isfinite(features).all()


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_resampling_keeps_time_and_frequency(rate):
    def tone(at):  # a fade at both ends keeps it band-limited
        t = np.arange(round(0.8 * at)) / at
        return np.sin(2 * np.pi * 1234 * t) * np.sin(np.pi * t / 0.8) ** 4

    resampled = resample(tone(rate), rate)
    assert resampled.dtype == np.float32
    assert len(resampled) == round(0.8 * RATE)
    # float32 rounds by 6e-8 below 1; the ends of the fade leave 1e-6 outside any band.
    np.testing.assert_allclose(resampled, tone(RATE), rtol=0, atol=2e-6)


def test_resampling_removes_frequencies_that_would_alias():
    tone = np.sin(2 * np.pi * 10_000 * np.arange(44_100) / 44_100) * np.hanning(44_100)
    assert np.abs(resample(tone, 44_100)).max() < 1e-4


# ---- Synthetic speech


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("synthetic")


@pytest.fixture(scope="module")
def synthetic(folder):
    return load_synthetic(folder, training=120, validation=60, seed=3)


def test_training_and_validation_share_no_voice(synthetic):
    training, validation = ({clip.speaker.split("+")[1] for clip in part} for part in synthetic)
    # Every voice occurs, so a leak would show.
    assert training == set(speech_data.TRAINING_VOICES)
    assert validation == set(speech_data.HELD_OUT_VOICES)
    assert not training & validation
    assert [len(part) for part in synthetic] == [120, 60]
    assert {clip.samples.dtype for part in synthetic for clip in part} == {np.dtype(np.float32)}


HASH = """
import hashlib, sys
import speech_data
for seed in (5, 6):
    clips = sum(speech_data.synthetic_clips(8, 4, seed), [])
    said = b"".join(clip.samples.tobytes() + clip.text.encode() for clip in clips)
    print(hashlib.sha256(said).hexdigest())
"""


def test_two_processes_make_the_same_clips_from_a_seed():
    def hashes():
        command = [sys.executable, "-c", f"import sys\nsys.path = {sys.path}\n{HASH}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()

    one = hashes()
    time.sleep(1)  # without a seed, eSpeak NG would take the clock's seconds
    assert one == hashes()
    assert one[0] != one[1]


def test_espeak_failures_give_clear_errors(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("espeakng_loader.get_library_path", lambda: "/no/such/library.so")
        with pytest.raises(RuntimeError, match=r"library\.so.*pip install .* --data DIR"):
            Synthesizer(seed=1)
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(RuntimeError, match=r"pip install -U espeakng-loader.* --data DIR"):
        Synthesizer(seed=1)


def digest(clips):
    said = [(clip.samples.tobytes(), clip.text, clip.speaker) for part in clips for clip in part]
    return hashlib.sha256(repr(said).encode()).hexdigest(), [len(part) for part in clips]


def test_second_load_reads_the_cached_file(folder, synthetic, monkeypatch):
    def synthesize(*_):
        raise AssertionError("synthesized again")

    monkeypatch.setattr(speech_data, "synthetic_clips", synthesize)
    assert digest(load_synthetic(folder, 120, 60, 3)) == digest(synthetic)
    assert len(list(folder.iterdir())) == 1, "a temporary file is left"
    for other in [(121, 60, 3), (120, 61, 3), (120, 60, 4)]:
        with pytest.raises(AssertionError, match="synthesized again"):
            load_synthetic(folder, *other)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:]]
)
def test_damaged_cache_file_is_rebuilt(damage, synthetic, tmp_path, monkeypatch):
    calls, clips = [], (synthetic[0][:5], synthetic[1][:3])

    def synthesize(*arguments):
        calls.append(arguments)
        return clips

    monkeypatch.setattr(speech_data, "synthetic_clips", synthesize)
    few = digest(load_synthetic(tmp_path, 1, 2, 3))
    [path] = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert digest(load_synthetic(tmp_path, 1, 2, 3)) == few
    assert few[1] == [5, 3]
    assert calls == [(1, 2, 3)] * 2


# ---- A user's own recordings


def record(path, text="hello", rate=RATE, width=2, channels=1, seconds=0.5):
    """Write a tone of 440 Hz at half of full scale; the second channel is silent."""
    t = np.arange(round(rate * seconds)) / rate
    samples = np.zeros((len(t), channels))
    samples[:, 0] = 0.5 * np.sin(2 * np.pi * 440 * t) * np.hanning(len(t))
    words = np.round(samples * (2 ** (8 * width - 1) - 1)).astype("<i8")
    if width == 1:
        words += 128
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(words.ravel().view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    path.with_suffix(".txt").write_text(text, "utf-8")


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_any_width_rate_and_channels_are_read(width, rate, channels, tmp_path):
    record(tmp_path / "a.wav", "  Good\n MORNING \n", rate, width, channels)
    record(tmp_path / "b.WAV", "\ufeffÜber", rate, width, channels)
    [clip], [held_out] = clips_of_folder(tmp_path)
    assert (held_out.text, clip.text, clip.speaker) == ("good morning", "über", ".")
    assert clip.samples.dtype == np.float32
    assert len(clip.samples) == RATE // 2
    t = np.arange(RATE // 2) / RATE
    expected = 0.5 * np.sin(2 * np.pi * 440 * t) * np.hanning(len(t)) / channels
    # Half a step of the sample width; the ends of the two windows differ by one sample in 22,050.
    tolerance = 2.0 ** (1 - 8 * min(width, 2)) + 1e-4
    np.testing.assert_allclose(clip.samples, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("speakers", "held_out"), [(2, ["00"]), (8, ["00"]), (9, ["00", "08"])])
def test_every_eighth_speaker_is_held_out(speakers, held_out, tmp_path):
    for speaker in range(speakers):
        for name in ("a", "b"):
            record(tmp_path / "deep" / f"{speaker:02}" / f"{name}.wav", seconds=0.1)
    training, validation = clips_of_folder(tmp_path)
    assert {clip.speaker for clip in validation} == {f"deep/{name}" for name in held_out}
    assert len(validation) == 2 * len(held_out)
    assert len(training) == 2 * (speakers - len(held_out))
    assert not {clip.speaker for clip in training} & {clip.speaker for clip in validation}


def test_one_error_names_every_bad_file(tmp_path):
    record(tmp_path / "good.wav")
    record(tmp_path / "empty text.wav", " \n")
    record(tmp_path / "no text.wav")
    (tmp_path / "no text.txt").unlink()
    record(tmp_path / "latin.wav")
    (tmp_path / "latin.txt").write_bytes("Über".encode("latin-1"))
    record(tmp_path / "long.wav", seconds=30.01, rate=4000)
    record(tmp_path / "silent.wav", seconds=0)
    record(tmp_path / "both.wav", "")
    (tmp_path / "both.wav").write_bytes(b"ID3 an mp3 file")
    record(tmp_path / "float.wav")
    data = bytearray((tmp_path / "float.wav").read_bytes())
    data[20] = 3  # WAVE_FORMAT_IEEE_FLOAT
    (tmp_path / "float.wav").write_bytes(data)
    (tmp_path / "._good.wav").write_bytes(b"what macOS leaves on other disks")  # is ignored

    with pytest.raises(ValueError, match="not a PCM file") as caught:
        clips_of_folder(tmp_path)
    assert [line.split("; ")[0] for line in str(caught.value).splitlines()] == [
        f"{tmp_path}/both.wav: not a PCM file (file does not start with RIFF id)",
        f"{tmp_path}/both.txt: empty",
        f"{tmp_path}/empty text.txt: empty",
        f"{tmp_path}/float.wav: not a PCM file (unknown format: 3)",
        f"{tmp_path}/latin.txt: cannot be read as UTF-8 text ('utf-8' codec can't decode byte "
        "0xdc in position 0: invalid continuation byte)",
        f"{tmp_path}/long.wav: longer than 30 s",
        f"{tmp_path}/no text.txt: missing",
        f"{tmp_path}/silent.wav: contains no sound",
    ]
    assert "ffmpeg -i float.wav -c:a pcm_s16le new.wav" in str(caught.value)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_files_are_refused(count, tmp_path):
    for i in range(count):
        record(tmp_path / f"{i}.wav")
    with pytest.raises(ValueError, match=rf"{count} \.wav files; put at least 2 below it"):
        clips_of_folder(tmp_path)
    with pytest.raises(ValueError, match=r"0 \.wav files"):
        clips_of_folder(tmp_path / "missing")
