"""Speak sentences with the library of eSpeak NG. `datasets.speech` runs this file as a program of its own.

The synthesizer carries random state from one sentence to the next, and offers no way to put it back. In a new process
it starts from the same state each time, so that the same sentences give the same samples.
"""

import ctypes
import json
import struct
import sys
from collections.abc import Iterator, Sequence

# Of eSpeak NG's speak_lib.h, which has names for them.
_SYNCHRONOUS = 2  # samples go to the callback before `espeak_Synth` returns
_DO_NOT_EXIT = 0x8000  # report missing data instead of ending the process
_RATE, _PITCH = 1, 3  # parameters: words per minute; 0 ... 100
_CHARACTERS, _UTF8 = 1, 1  # positions are counted in characters; the encoding of the text

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def speak(library: str, data: str, sentences: Sequence[tuple[str, int, int, str]]) -> Iterator[tuple[int, bytes]]:
    """Yield the sample rate and the 16-bit samples of one sentence after the other.

    Args:
        library: Path of the shared library.
        data: Path of its folder of voices.
        sentences: Voice, words per minute, pitch (0 ... 100) and text of each.

    Raises:
        RuntimeError: If the library refuses to start or to speak.
    """
    espeak = ctypes.CDLL(library)
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p,
        ctypes.c_size_t,
        *[ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint],
        *[ctypes.c_void_p, ctypes.c_void_p],
    ]
    samples = bytearray()

    def keep(wave: "ctypes._Pointer[ctypes.c_short]", n: int, events: int | None) -> int:
        if wave and n > 0:
            samples.extend(ctypes.string_at(wave, 2 * n))
        return 0

    rate = espeak.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DO_NOT_EXIT)
    if rate <= 0:
        raise RuntimeError("eSpeak NG does not start.")
    callback = _Callback(keep)  # held by this variable: the library does not keep it alive
    espeak.espeak_SetSynthCallback(callback)
    if hasattr(espeak, "espeak_ng_SetRandSeed"):  # since version 1.52, which else starts from the time of day
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))
    for voice, speed, pitch, text in sentences:
        samples.clear()
        spoken = text.encode() + b"\0"
        states = [
            espeak.espeak_SetVoiceByName(voice.encode()),
            espeak.espeak_SetParameter(_RATE, speed, 0),
            espeak.espeak_SetParameter(_PITCH, pitch, 0),
            espeak.espeak_Synth(spoken, len(spoken), 0, _CHARACTERS, 0, _UTF8, None, None),
            espeak.espeak_Synchronize(),
        ]
        if any(states):
            raise RuntimeError(f"eSpeak NG does not speak: {states} for the voice {voice}.")
        yield rate, bytes(samples)
    espeak.espeak_Terminate()


def main() -> None:
    """Read paths and sentences as JSON, and write rate, number of bytes and samples of each sentence."""
    for rate, samples in speak(*json.load(sys.stdin)):
        sys.stdout.buffer.write(struct.pack("<ii", rate, len(samples)) + samples)


if __name__ == "__main__":
    main()
