"""Pages from outside: checked, and put into memory, one frame after another on each channel."""
from collections.abc import Callable, Sequence
from functools import partial

from .._core.copy import PageBoard, PageIntake
from ..errors import VfioError
from . import stream
from .channel import FrameChannel
from .compression import Codec
from .layout import MemoryLayout
from .stream import COMPRESSED, Checksum, Compression, Header, Kind, Totals, damaged
from .together import together


def open_boards(layout: MemoryLayout, fresh: bool) -> list[PageBoard]:
    """Return what notes which pages came, for each block; ``release`` them before the layout is closed."""
    return [PageBoard(block.view, layout.pgsize, fresh) for block in layout.blocks]


class ChannelIntake:
    """Puts what one channel brings into memory, and counts it.

    Parameters
    ----------
    channel : FrameChannel
        Its checksum is agreed on.
    boards : sequence of PageBoard
        The blocks; shared by all channels.
    pgsize : int
        Bytes of a page.
    compression : Compression
        What READY said.

    Attributes
    ----------
    totals : Totals
        Of this epoch so far.
    attempt : int
        Number of this attempt at an epoch, over all connections: a page comes at most once in each.
    touched : bool
        Something was put into memory, be it a part of a frame.
    """

    def __init__(self, channel: FrameChannel, boards: Sequence[PageBoard], pgsize: int,
                 compression: Compression = Compression.NONE) -> None:
        self.channel = channel
        self._boards = boards
        self._pgsize = pgsize
        self._codec = Codec(compression) if compression else None
        self._intake = PageIntake(stream.MAX_RUNS)
        self.totals = Totals(0, 0, 0)
        self.attempt = 0
        self.touched = False

    def take(self, header: Header, body: memoryview) -> None:
        """Check a frame of PAGES or ZEROS, then do what it says.

        Raises
        ------
        ProtocolError
            EPROTO: the frame can't be; memory was not touched.
        """
        if header.block >= len(self._boards):
            raise damaged(f"there is no block {header.block}")
        most = stream.DIRECT_BYTES if header.kind is Kind.PAGES else stream.ZEROS_BYTES
        try:
            count = self._intake.admit(self._boards[header.block], body, header.nruns, self.attempt,
                                       most // self._pgsize)
        except VfioError as exc:
            exc.hint = f"{header.kind.name} {exc.hint}"
            raise
        size, length = count * self._pgsize, header.length - header.nruns * stream.RUN_SIZE
        compressed = bool(header.flags & COMPRESSED)
        fits = 0 < length < size if compressed else length == (size if header.kind is Kind.PAGES else 0)
        if not fits:
            raise damaged(f"{header.kind.name} with {length} bytes for {count} pages")
        # From here on the frame is good, unless compressed content is not.
        self.touched = True
        frames, pages, zero_pages = self.totals
        if header.kind is Kind.ZEROS:
            self._intake.clear()
            self.totals = Totals(frames + 1, pages, zero_pages + count)
            return
        content = body[header.nruns * stream.RUN_SIZE:]
        if compressed:
            if self._codec is None:
                raise damaged("PAGES are compressed, which was not agreed on")
            self._intake.put(self._codec.expand(content, size))
        elif self.channel.checksum is Checksum.NONE:
            self._receive_content()
        else:
            self._intake.put(content)
        self.totals = Totals(frames + 1, pages + count, zero_pages)

    def _receive_content(self) -> None:
        views = self._intake.views()
        try:
            self.channel.receive_content(views)
        finally:
            for view in views:      # a traceback must not hold the memory
                view.release()
        self._intake.done()

    def take_epoch(self, epoch: int, ended: Callable[[], bool]) -> None:
        """Take what a further channel brings, up to its barrier.

        Parameters
        ----------
        epoch : int
            The current one.
        ended : callable
            Whether channel 0 has seen the epoch's end.  Up to then nothing may come for any time: channel 0 knows
            whether the source is alive.
        """
        while True:
            while not self.channel.transport.wait_readable() and not ended():
                pass
            header, body = self.channel.receive(Kind.PAGES, Kind.ZEROS, Kind.BARRIER)
            if header.epoch != epoch:
                raise damaged(f"a frame of epoch {header.epoch} in epoch {epoch}")
            if header.kind is Kind.BARRIER:
                if stream.decode_totals(body) != self.totals:
                    raise damaged(f"a channel ends epoch {epoch} with other totals than it brought")
                return
            self.take(header, body)


def take_epoch(intakes: Sequence[ChannelIntake], epoch: int, attempt: int,
               control: Callable[[], Totals]) -> Totals:
    """Take in one epoch on all channels, a thread each.

    Parameters
    ----------
    intakes : sequence of ChannelIntake
        That of channel 0 first.
    epoch : int
        The current one.
    attempt : int
        As of ChannelIntake.
    control : callable
        Receives the frames of channel 0 up to END, hands PAGES and ZEROS to ``intakes[0].take``, and returns END's
        totals.  Called in this thread.

    Returns
    -------
    Totals
        What was received on all channels, which is what END said.

    Raises
    ------
    ProtocolError
        EPROTO: a frame that can't be, on any channel; or other totals.  No channel receives any more then; channel 0
        can send.
    MigrationError
        The source is gone, or silent, on any channel.
    """
    said: list[Totals] = []

    def run_control() -> None:
        said.append(control())

    def give_up(_: BaseException) -> None:
        for intake in intakes:
            intake.channel.transport.interrupt(sending=False)

    for intake in intakes:
        intake.totals, intake.attempt = Totals(0, 0, 0), attempt
    works: list[Callable[[], None]] = [run_control]
    works += [partial(intake.take_epoch, epoch, lambda: bool(said)) for intake in intakes[1:]]
    together(works, give_up)
    totals = Totals(*map(sum, zip(*(intake.totals for intake in intakes), strict=True)))
    if said[0] != totals:
        raise damaged(f"epoch {epoch} ends with other totals than were received")
    return totals
