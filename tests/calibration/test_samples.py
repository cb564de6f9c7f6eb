"""The bounded sample of a stream of images."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastres.calibration.samples import LEAST, Sampler
from fastres.errors import CalibrationError


def filled(count: int, most: int, skip: int = 0) -> Sampler:
    """Return a sampler that has seen ``count`` images; the first row of each tells its number."""
    sampler = Sampler(most)
    for number in range(count):
        image = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8, device="cpu")
        image[:, 0] = number % 256
        sampler.add(image, number % 10)
    for number in range(skip):
        sampler.skip(f"{number}.jpg", f"'{number}.jpg' is empty.")
    return sampler


def test_all_images_are_kept_in_order_if_there_are_few() -> None:
    samples = filled(40, 40, skip=3).samples()
    assert samples.pixels[:, 0, 0, 0].tolist() == list(range(40))
    assert samples.labels is not None
    assert samples.labels.tolist() == [number % 10 for number in range(40)]
    assert (samples.read, samples.skipped, samples.reasons[1][0]) == (43, 3, "1.jpg")
    assert samples.pixels.is_contiguous(memory_format=torch.channels_last)


def test_the_parts_have_no_image_in_common() -> None:
    samples = filled(41, 41).samples()
    parts = [part[:, 0, 0, 0].tolist() for part in (samples.fit, samples.choose, samples.judge)]
    assert sorted(itertools.chain.from_iterable(parts)) == list(range(41))
    assert [len(part) for part in parts] == [21, 10, 10]
    many = filled(2000, 2000).samples()
    assert [len(part) for part in (many.fit, many.choose, many.judge)] == [256, 64, 1680]
    assert samples.judge_labels is not None
    assert samples.judge_labels.tolist() == [number % 10 for number in parts[2]]


def test_a_stream_is_sampled_evenly_and_always_alike() -> None:
    kept = filled(250, 50).samples().pixels[:, 0, 0, 0].tolist()
    assert kept == sorted(set(kept))
    assert len(kept) == 50
    assert 5 <= sum(number < 50 for number in kept) <= 16
    assert kept == filled(250, 50).samples().pixels[:, 0, 0, 0].tolist()


def test_too_few_images_are_counted() -> None:
    with pytest.raises(CalibrationError, match=rf"7 usable images .* at least {LEAST} .*2 could not .* '0.jpg' is emp"):
        filled(7, 100, skip=2).samples()
    with pytest.raises(CalibrationError, match="1 usable image "):
        filled(1, 100).samples()
    assert len(filled(8, 100).samples().judge) == 2


def test_images_without_content_are_refused() -> None:
    flat, same = Sampler(20), Sampler(20)
    picture = torch.randint(0, 256, (3, 6, 5), dtype=torch.uint8, device="cpu")
    for number in range(20):
        flat.add(torch.full((3, 6, 5), number, dtype=torch.uint8, device="cpu"))
        same.add(picture)
    with pytest.raises(CalibrationError, match="one colour only"):
        flat.samples()
    with pytest.raises(CalibrationError, match="the same picture"):
        same.samples()
