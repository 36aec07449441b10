"""Comparing a kernel with the model, and shrinking what differs."""
import struct
from dataclasses import replace

from .script import ARG, IOCTL, SLOTS, VALUE, decode


class Difference:
    """A script that kernel and model answer differently."""

    def __init__(self, name, steps, kernel, model):
        self.name = name
        self.steps = steps
        self.kernel = decode(*kernel)
        self.model = decode(*model)

    @property
    def first(self):
        """The first step that differs; those from len(steps) on are the final closes."""
        pairs = zip(self.kernel, self.model, strict=False)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(self.kernel), len(self.model)))

    def __str__(self):
        lines = [self.name]
        for index in range(self.first + 1):
            text = (str(self.steps[index]) if index < len(self.steps)
                    else f"close({SLOTS[index - len(self.steps)]}) at the end")
            lines.append(f"  {index:2} {text}")
            if index < self.first:
                lines.append(f"       {self.kernel[index]}")
        for who, answers in (("kernel", self.kernel), ("model ", self.model)):
            lines.append(f"       {who}: {answers[self.first] if self.first < len(answers) else 'nothing'}")
        return "\n".join(lines)


def differences(scripts, names, kernel, model):
    """Yield a Difference for each script whose answers are not the same bytes."""
    for steps, name, a, b in zip(scripts, names, kernel, model, strict=True):
        if a != b:
            yield Difference(name, steps, a, b)


def smaller(steps):
    """Yield scripts with some steps left out, the smallest ones first."""
    size = len(steps)
    chunk = size // 2
    while chunk:
        for start in range(0, size, chunk):
            yield steps[:start] + steps[start + chunk:]
        chunk //= 2


def simpler(steps):
    """Yield scripts with one step made plainer."""
    for index, step in enumerate(steps):
        changes = []
        if step.op == IOCTL and not step.flags & VALUE:
            if step.a != ARG:
                changes.append(replace(step, a=ARG))
            if step.flags & 2:
                changes.append(replace(step, flags=step.flags & ~2))
            if step.request == 0x3b71 and len(step.data) == 32:
                argsz, flags, vaddr, iova, length = struct.unpack("<IIQQQ", step.data)
                plainer = [(32, flags, vaddr, iova, length), (argsz, 3, vaddr, iova, length),
                           (argsz, flags, vaddr, iova, 4096)]
                changes += [replace(step, data=struct.pack("<IIQQQ", *fields)) for fields in plainer]
        for change in changes:
            if change != step:
                yield steps[:index] + [change] + steps[index + 1:]


def shrink(difference, guest, model, rounds=12):
    """Return the smallest script found that still differs; each round is one batch in the guest."""
    best = difference
    steps = best.steps[:best.first + 1]
    queue = [steps] if len(steps) < len(best.steps) else []
    for _ in range(rounds):
        candidates = (queue + list(smaller(best.steps)) + list(simpler(best.steps)))[:200]
        names = [best.name] * len(candidates)
        found = list(differences(candidates, names, guest.play(candidates), model.play(candidates)))
        if not found:
            break
        # Steps that can go one by one can often go together.
        singly = {id(step) for d in found if len(d.steps) == len(best.steps) - 1
                  for step in [s for s in best.steps if all(s is not kept for kept in d.steps)]}
        queue = [[step for step in best.steps if id(step) not in singly]]
        best = min(found, key=lambda d: len(d.steps))
        queue = [steps for steps in queue if len(steps) < len(best.steps)]
        queue += [best.steps[:best.first + 1]] if best.first + 1 < len(best.steps) else []
    return best
