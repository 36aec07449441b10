"""A software device for tests: PCI Express, MSI-X, regions of every kind; everything optional can be given."""


class Card:
    """A card whose registers are plain memory.

    ``regions`` maps an index to its size; ``optional`` are attributes of the SoftwareDevice protocol.
    """

    def __init__(self, address="0000:00:14.0", *, regions=None, irqs=(1, 1, 5, 1, 1), flags=None, **optional):
        self.address = address
        self.sizes = {0: 0x20000, 3: 0x4000, 7: 0x1000} if regions is None else regions
        self.memory = {index: bytearray(size) for index, size in self.sizes.items()}
        self.irqs = irqs
        self.flags = flags or {}
        self.accesses = []
        self.resets = 0
        self.sink = None
        self.port = None
        for name, value in optional.items():
            setattr(self, name, value)

    def connect(self, port):
        self.port = port

    def disconnect(self):
        self.port = None

    def set_irq_sink(self, sink):
        self.sink = sink

    def region_size(self, index):
        return self.sizes.get(index, 0)

    def region_flags(self, index):
        return self.flags.get(index, 3)

    def region_mmap(self, index, offset, size):
        return memoryview(self.memory[index])[offset:offset + size]

    def region_read(self, index, offset, size):
        if index < 6:
            self.accesses.append((index, offset, size))
        return bytes(self.memory[index][offset:offset + size])

    def region_write(self, index, offset, data):
        if index < 6:
            self.accesses.append((index, offset, data))
        self.memory[index][offset:offset + len(data)] = data

    def irq_count(self, index):
        return self.irqs[index]

    def reset(self):
        self.resets += 1
        if 7 in self.memory:
            self.memory[7][:64] = bytes(64)
