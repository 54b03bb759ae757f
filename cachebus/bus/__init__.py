"""Message delivery: the in-process bus, the NATS bus and the message codec. Imports `messages` only."""

from .address import Address, check_word
from .api import Bus, Envelope, Turn, Visibility
from .clock import SYSTEM_CLOCK, Clock, running_deadlines
from .compat import running_loop
from .events.emitter import Emitter, origin
from .events.subscription import EventPolicy, KeyForm, Subscription, SubscriptionRegistry, event_kinds, shares
from .local import TURNS_PER_CHECKPOINT, LocalBus
from .reply_ports import DeferredReply, ReplyPort, TaskPort, ThreadPort, in_event_loop, open_port, too_late
from .reply_slots import PENDING, Pending, ReplySlot, SlotBatch
from .timers import LoopTimers, Timer, TimerQueue, running_timers
from .tracing import current_trace, turn_trace, use_trace

__all__ = [
    "PENDING",
    "SYSTEM_CLOCK",
    "TURNS_PER_CHECKPOINT",
    "Address",
    "Bus",
    "Clock",
    "DeferredReply",
    "Emitter",
    "Envelope",
    "EventPolicy",
    "KeyForm",
    "LocalBus",
    "LoopTimers",
    "Pending",
    "ReplyPort",
    "ReplySlot",
    "SlotBatch",
    "Subscription",
    "SubscriptionRegistry",
    "TaskPort",
    "ThreadPort",
    "Timer",
    "TimerQueue",
    "Turn",
    "Visibility",
    "check_word",
    "current_trace",
    "event_kinds",
    "in_event_loop",
    "open_port",
    "origin",
    "running_deadlines",
    "running_loop",
    "running_timers",
    "shares",
    "too_late",
    "turn_trace",
    "use_trace",
]
