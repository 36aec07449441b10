"""Differential fuzzing: random scripts of system calls, played by a real kernel in the lab and by the model."""
from . import generate, generate_iommufd
from .compare import differences, shrink
from .players import LAB, Guest, Model


def fuzz(kernel, seed, sequences, *, first=0, length=30, batch=200, lab=LAB, progress=None):
    """Yield what differs, as small as it gets, in ``sequences`` scripts of ``length`` steps."""
    generator = generate_iommufd if kernel.endswith("-iommufd") else generate
    model, guest = Model(kernel), Guest(kernel, lab)
    found = 0
    try:
        for start in range(first, first + sequences, batch):
            numbers = range(start, min(start + batch, first + sequences))
            scripts = [generator.generate(seed, number, length) for number in numbers]
            names = [f"kernel {kernel}, seed {seed}, sequence {number}" for number in numbers]
            guest.start(scripts)                    # the guest and the model play at the same time
            answers = model.play(scripts)
            for difference in differences(scripts, names, guest.finish(), answers):
                found += 1
                yield shrink(difference, guest, model)
            if progress:
                progress(numbers[-1] + 1 - first, found)
    finally:
        guest.close()
        model.close()
