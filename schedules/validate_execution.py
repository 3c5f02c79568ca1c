"""Abstract execution of a plan: does every rank get to its end?

A SEND hands its tensor to its channel and its rank goes on, unless the message before it is still
in the channel, which it leaves when its RECV is posted. So a channel, one per (peer, kind, chunk),
holds one message. A RECV never waits; a WAIT waits until its message was sent. In a plan without
messages, a computation waits until the neighbouring stages have what it needs.

What has happened stays so, and that is all that anything waits for: if one order of execution gets
to the end, every order does, at any speed of ranks and links. Channels that hold more, as gloo's
and NCCL's do for a rank that only posts its sends, just take waits away.
"""

from __future__ import annotations

from collections import defaultdict

from megatron_mhc.schedules.plan import COMMUNICATION, Kind, Op, Plan


def stuck(plan: Plan) -> list[str]:
    """The operations at which ranks wait for ever; empty if all ranks finish."""
    return _Execution(plan).run()


class _Execution:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lowered = any(op.kind in COMMUNICATION for _, _, op in plan.leaves())
        self.at = [0] * plan.pp
        # Results of computations by (payload, stage, microbatch, direction); of messages, ('sent',
        # channel, microbatch) and ('posted', channel, how many).
        self.done: set[tuple] = set()
        self.sent: dict[tuple, int] = defaultdict(int)
        self.posted: dict[tuple, int] = defaultdict(int)
        # What a rank waits for -> the ranks to look at when it happens.
        self.waiting: dict[tuple, list[int]] = {}
        self.ready = list(range(plan.pp))

    def run(self) -> list[str]:
        blocked: dict[int, tuple] = {}
        while self.ready:
            rank = self.ready.pop()
            blocked.pop(rank, None)
            ops = self.plan.ranks[rank]
            while self.at[rank] < len(ops):
                op = ops[self.at[rank]]
                event = self._missing(op)
                if event is not None:
                    self.waiting.setdefault(event, []).append(rank)
                    blocked[rank] = event
                    break
                self.at[rank] += 1
                self._finish(op)
        return [
            f'rank {rank}, operation {self.at[rank]}, {self.plan.ranks[rank][self.at[rank]]}: '
            f'waits for ever for {self._name(event)}'
            for rank, event in sorted(blocked.items())
        ]

    def _missing(self, op: Op) -> tuple | None:
        """What ``op`` has to wait for, if anything."""
        kind = op.kind
        if kind is Kind.SEND:
            channel = self.plan.channel(op)
            before = self.sent[channel]
            return None if self.posted[channel] >= before else ('posted', channel, before)
        if kind is Kind.WAIT:
            message = 'sent', self.plan.channel(op), op.microbatch
            return None if message in self.done else message
        for leaf in op.leaves:
            needed = self._input(leaf)
            if needed is not None and needed not in self.done:
                return needed
        return None

    def _input(self, op: Op) -> tuple | None:
        """The computation whose result ``op`` takes without a message."""
        kind, stage, holders = op.kind, op.stage, self.plan.placement[op.direction]
        if kind is Kind.F and stage > 0:
            payload, source = 'F', stage - 1
        elif (kind is Kind.B or kind is Kind.I) and stage + 1 < len(holders):
            payload, source = 'B', stage + 1
        else:
            return None
        if self.lowered and holders[source] != holders[stage]:
            return None
        return payload, source, op.microbatch, op.direction

    def _finish(self, op: Op) -> None:
        kind = op.kind
        if kind is Kind.SEND:
            channel = self.plan.channel(op)
            self.sent[channel] += 1
            self._announce(('sent', channel, op.microbatch))
        elif kind is Kind.RECV:
            channel = self.plan.channel(op)
            self.posted[channel] += 1
            self._announce(('posted', channel, self.posted[channel]))
        else:
            for leaf in op.leaves:
                if leaf.kind is Kind.F:
                    self._announce(('F', *leaf.key))
                elif leaf.kind is Kind.B or leaf.kind is Kind.I:
                    self._announce(('B', *leaf.key))

    def _announce(self, event: tuple) -> None:
        self.done.add(event)
        if event in self.waiting:
            self.ready += self.waiting.pop(event)

    def _name(self, event: tuple) -> str:
        if event[0] == 'posted':
            (_, target, *_), number = event[1:]
            return f'rank {target} to post the receive of message {number - 1}'
        if event[0] == 'sent':
            (rank, _, payload, stage, direction), mb = event[1:]
            return f'{Op(Kind.SEND, stage, mb, direction, payload)} of rank {rank}'
        op = Op(Kind(event[0]), *event[1:])
        return f'{op} of rank {self.plan.rank_of(op.stage, op.direction)}'
