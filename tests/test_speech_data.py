"""The data of the speech example: features, synthetic speech, a user's own recordings."""

import hashlib
import subprocess
import sys
import time
import wave

import numpy as np
import pytest
import speech_data
from speech_data import Clip, Synthesizer, clips_of_folder, load_synthetic, log_mel, resample

pytestmark = pytest.mark.examples

RATE = speech_data.SAMPLE_RATE
SIGNALS = {
    "noise": np.random.default_rng(0).normal(0, 0.1, 16_100),
    "loud, then silence": np.r_[np.sin(np.arange(4000.0)), np.zeros(4000)],
    "one frame": np.random.default_rng(1).normal(0, 0.1, 201),
    "not a whole frame more": np.random.default_rng(2).normal(0, 0.1, 799),
}


# ---- Features


def slaney_mel(hertz):
    return np.where(
        hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(hertz.clip(1) / 1000) / np.log(6.4)
    )


def whisper_log_mel(samples):
    """Whisper's features in float64, by another Fourier transform and a grid for Slaney's scale."""
    torch = pytest.importorskip("torch")
    stft = torch.stft(
        torch.from_numpy(samples),
        n_fft=400,
        hop_length=160,
        window=torch.hann_window(400, dtype=torch.float64),
        pad_mode="reflect",
        return_complex=True,
    )
    power = stft.abs().numpy()[:, :-1] ** 2
    grid = np.linspace(0, 8000, 1_000_001)
    mel = slaney_mel(grid)
    edges = np.interp(np.linspace(0, mel[-1], 82), mel, grid)
    bins = np.arange(201) * 40.0
    mels = np.stack(
        [
            np.interp(bins, edges[i : i + 3], [0, 2, 0]) / (edges[i + 2] - edges[i])
            for i in range(80)
        ]
    )
    decades = np.log10((mels @ power).clip(1e-10))
    return (decades.clip(decades.max() - 8).T + 4) / 4


@pytest.mark.parametrize("name", SIGNALS)
def test_log_mel_equals_whispers_features(name):
    features = log_mel(SIGNALS[name])
    assert features.dtype == np.float32
    assert features.shape == (len(SIGNALS[name]) // 160, 80)
    # Ours is float64 except for the last cast (1.2e-7 below 2). The grid is accurate to 1e-9.
    np.testing.assert_allclose(features, whisper_log_mel(SIGNALS[name]), rtol=0, atol=1e-6)


def test_log_mel_equals_transformers_features():
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor()
    for samples in SIGNALS.values():
        theirs = extractor(samples, sampling_rate=RATE, padding=False, return_tensors="np")
        # transformers keeps spectra in complex64: 2e-6 on noise, 4e-5 eight decades below a tone.
        expected = theirs["input_features"][0].T
        np.testing.assert_allclose(log_mel(samples), expected, rtol=0, atol=2e-4)


def test_mel_filters_have_slaneys_centres_and_areas():
    filters = speech_data.mel_filters()
    bins = np.arange(201) * 40.0
    assert filters.shape == (201, 80)
    centroids = bins @ filters / filters.sum(axis=0)
    assert (np.diff(centroids) > 0).all()
    wide = centroids > 3000
    # Here 40 Hz bins sample triangles of over 250 Hz: sums are within a few percent of area 1.
    np.testing.assert_allclose(filters.sum(axis=0)[wide] * 40, 1, atol=0.03)
    # 1 kHz is 15 of 45.2 mel: between the 26th and the 27th of 81 steps, closer to the 27th.
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    assert log_mel(tone).mean(axis=0).argmax() == 26


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


def voices(clips):
    return {clip.speaker.split("+")[1] for clip in clips}


def test_training_and_validation_share_no_voice(synthetic):
    training, validation = synthetic
    assert (len(training), len(validation)) == (120, 60)
    # Training has 120 of 126 speakers, validation 60 clips of 28 speakers: every voice occurs, so a
    # leak would show.
    assert voices(training) == set(speech_data.TRAINING_VOICES)
    assert voices(validation) == set(speech_data.HELD_OUT_VOICES)
    assert not voices(training) & voices(validation)
    assert sum(voice[0] == "m" for voice in voices(validation)) >= 2
    assert sum(voice[0] == "f" for voice in voices(validation)) >= 2
    assert {clip.speaker.split("+")[0] for clip in validation} == set(speech_data.ACCENTS)


def test_every_word_is_said_about_equally_often(synthetic):
    for clips in synthetic:
        words = [clip.text.split() for clip in clips]
        assert {len(said) for said in words} == {1, 2, 3}
        for vocabulary in (speech_data.DIGITS, speech_data.COMMANDS):
            counts = [sum(said.count(word) for said in words) for word in vocabulary]
            assert min(counts) > 0
            assert max(counts) - min(counts) <= 2  # each word twice in a pass


def test_clips_are_loud_enough_and_not_clipped(synthetic):
    clips = [clip for part in synthetic for clip in part]
    peaks = np.array([np.abs(clip.samples).max() for clip in clips])
    assert all(clip.samples.dtype == np.float32 for clip in clips)
    # -20 to -1 dB, except for the rounding to 16 bits.
    assert 0.1 - 2**-16 <= peaks.min() < 0.2
    assert 0.7 < peaks.max() <= 10 ** (-1 / 20) + 2**-16
    seconds = np.array([len(clip.samples) / RATE for clip in clips])
    assert seconds.min() > 0.2
    assert seconds.max() < 4


def test_noise_is_10_to_40_db_below_the_speech(synthetic):
    clips = [clip.samples for part in synthetic for clip in part]
    # The first 40 ms hold only noise.
    decibels = [10 * np.log10(np.mean(x**2) / np.mean(x[:640] ** 2)) for x in clips]
    # The median of 180 uniform draws is 25 ± 1.1; pink noise over 40 ms varies by a few dB.
    assert 21 < np.median(decibels) < 29
    assert np.percentile(decibels, 5) < 15
    assert np.percentile(decibels, 95) > 35


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


def test_synthesizer_obeys_speed_and_pitch():
    synthesizer = Synthesizer(seed=1)

    def say(speed=170, pitch=50):
        return synthesizer("seven", "en-us+m3", speed=speed, pitch=pitch, pitch_range=0)

    def fundamental(samples):  # Hz, by autocorrelation between 60 and 300 Hz
        power = np.abs(np.fft.rfft(samples, 2 * len(samples))) ** 2
        lags = np.fft.irfft(power)[RATE // 300 : RATE // 60]
        return RATE / (lags.argmax() + RATE // 300)

    def seconds(samples):
        return len(speech_data.trimmed(samples)) / RATE

    assert seconds(say(speed=130)) > 1.2 * seconds(say(speed=220))
    assert fundamental(say(pitch=80)) > 1.2 * fundamental(say(pitch=20))


def test_trimming_keeps_50_ms_at_both_ends():
    speech = np.r_[np.zeros(5000), np.ones(1000), np.full(3000, 0.001)]
    trimmed = speech_data.trimmed(speech)
    assert len(trimmed) == 800 + 1000 + 800
    assert (trimmed[800:1800] == 1).all()


def test_espeak_failures_give_clear_errors(monkeypatch):
    synthesizer = Synthesizer(seed=1)
    with pytest.raises(RuntimeError, match=r"SetVoiceByName failed .* 'no-such\+m1'"):
        synthesizer("one", "no-such+m1", speed=170, pitch=50, pitch_range=50)
    with pytest.raises(RuntimeError, match="no sound for ''"):
        synthesizer("", "en-us+m1", speed=170, pitch=50, pitch_range=50)
    with monkeypatch.context() as patched:
        patched.setattr(speech_data, "HELD_OUT_VOICES", ("m2", "nobody"))
        with pytest.raises(RuntimeError, match="lacks the voices nobody"):
            Synthesizer(seed=1)
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
    "damage",
    [
        lambda data: b"",
        lambda data: b"not an archive",
        lambda data: data[: len(data) // 2],
        lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:],
    ],
    ids=["empty", "other", "truncated", "one bit"],
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


def test_written_wav_file_reads_back(tmp_path):
    samples = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    samples[:2] = -1, 1
    for name in ("a", "b"):
        speech_data.write_wav(tmp_path / f"{name}.wav", Clip(samples, name, "me"))
        (tmp_path / f"{name}.txt").write_text(name)
    [clip], _ = clips_of_folder(tmp_path)
    # Half a step of 16 bits; a whole step at +1, which 16 bits cannot represent.
    np.testing.assert_allclose(clip.samples[2:], samples[2:], rtol=0, atol=2.0**-16)
    np.testing.assert_array_equal(clip.samples[:2], np.float32([-1, 1 - 2.0**-15]))


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


def test_every_eighth_clip_of_a_single_speaker_is_held_out(tmp_path):
    for i in range(10):
        record(tmp_path / f"{i}.wav", str(i), seconds=0.1)
    training, validation = clips_of_folder(tmp_path)
    assert [clip.text for clip in validation] == ["0", "8"]
    assert [clip.text for clip in training] == list("1234567" + "9")


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


def test_clip_of_exactly_30_seconds_is_accepted(tmp_path):
    record(tmp_path / "a.wav", seconds=30, rate=4000)
    record(tmp_path / "b.wav")
    assert len(clips_of_folder(tmp_path)[1][0].samples) == 30 * RATE


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_files_are_refused(count, tmp_path):
    for i in range(count):
        record(tmp_path / f"{i}.wav")
    with pytest.raises(ValueError, match=rf"{count} \.wav files; put at least 2 below it"):
        clips_of_folder(tmp_path)
    with pytest.raises(ValueError, match=r"0 \.wav files"):
        clips_of_folder(tmp_path / "missing")
