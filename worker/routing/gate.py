"""
Looks at a job before it is routed: is it too large, and where do its URLs lead?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from common.errors import AddressRefused, InvalidRequest, KeyReused, OverLimit, QueueFull, ShiftworkerError
from common.job_store import JobStore
from common.may_enter import Entry, Held, Taken, check_body, check_share
from common.may_reach import Allowed, Target, check_reach, remote_urls, target_of
from common.resolve import resolve
from common.schemas import JobRequest, Route
from common.settings import ANY_HOST, EgressSettings, LimitSettings

_RESOLVE_S = 5.0
_LONGEST_URL = 2000  # as JobRequest.webhook
_MOST_URLS = 100  # in one job: each may take a look at the name servers

Resolve = Callable[[str, int], list[str]]


class SameKey(Exception):
    """
    The job is the same as *first*: same tenant, same idempotency key, same work.

    It holds *entry* while it waits for that one's end; *no_room* says why, if its tenant has no room for that.
    """

    def __init__(self, first: str, entry: Entry, no_room: Callable[[Held], ShiftworkerError]) -> None:
        super().__init__(first)
        self.first = first
        self.entry = entry
        self.no_room = no_room


class Gate:
    """
    The router's door.

    Parameters
    ----------
    webhooks
        Can webhooks be signed, and so be sent?
    find
        Gives the addresses of a host at a port.
    """

    def __init__(
        self,
        *,
        limits: LimitSettings,
        egress: EgressSettings,
        webhooks: bool,
        find: Resolve = lambda host, port: resolve(host, port, timeout_s=_RESOLVE_S),
    ) -> None:
        self._limits = limits
        self._allowed = Allowed.parse(egress.allow)
        self._media_hosts = frozenset(host.lower() for host in egress.media_domains)
        self._webhooks = webhooks
        self._find = find

    def check(self, request: JobRequest) -> None:
        """
        See that the job may be routed. Asks the name servers if it has URLs; see `plain`.

        Raises
        ------
        OverLimit
            It is too large, or asks for too much.
        InvalidRequest
            It names a webhook, and webhooks are off.
        AddressRefused
            One of its URLs leads where it may not.
        """
        check_body(request, self._limits)
        if request.webhook is not None:
            self._check_webhook(request.webhook)
        for number, target in enumerate(self._media(request)):
            if number >= _MOST_URLS:
                raise AddressRefused(
                    f"The body has more than {_MOST_URLS} URLs. Send the content itself, as data: URLs."
                )
            check_reach(target, self._find(target.host, target.port), self._allowed)

    def plain(self, request: JobRequest) -> bool:
        """Can the job be checked without asking anybody?"""
        return request.webhook is None and next(remote_urls(_content(request)), None) is None

    def enter(self, store: JobStore, job_id: str, request: JobRequest, route: Route) -> None:
        """
        Note the job as routed, with its share of its tenant's limits.

        Raises
        ------
        QueueFull, OverLimit, KeyReused, SameKey
            Its tenant has no room for it, or its idempotency key is another job's; nothing was noted.
        """
        entry = self.entry(request)
        refused = store.note_routed(job_id, route, entry)
        if isinstance(refused, Held):
            raise self.no_room(request, refused)
        if isinstance(refused, Taken):
            if refused.same_body:
                raise SameKey(refused.job_id, entry, lambda held: self.no_room(request, held))
            raise KeyReused(
                f"idempotency_key {request.idempotency_key!r} of tenant {request.tenant!r} is that of job "
                f"{refused.job_id}, which asks for something else. A key stands for one piece of work: send this job "
                "with a key of its own."
            )

    def no_room(self, request: JobRequest, held: Held) -> ShiftworkerError:
        """Say why the job's tenant has no room for it, beside what it *held* a moment ago."""
        try:
            check_share(request, held, self._limits)
        except (OverLimit, QueueFull) as error:
            return error
        return QueueFull(f"Tenant {request.tenant!r} has no room for this job now; try again.", 1.0)

    def entry(self, request: JobRequest) -> Entry:
        """What the job holds from now to its end."""
        return Entry.of(request, self._limits)

    def webhook_of(self, body: object) -> str | None:
        """The webhook to tell of the job's end, even if nothing else of its *body* can be read."""
        named = body.get("webhook") if self._webhooks and isinstance(body, dict) else None
        if not isinstance(named, str) or len(named) > _LONGEST_URL:
            return None
        try:
            target_of(named)
        except AddressRefused:
            return None
        return named

    def _check_webhook(self, url: str) -> None:
        if not self._webhooks:
            raise InvalidRequest("webhook: they are off here. The operator turns them on with WEBHOOK_SECRET.")
        target = target_of(url)
        if addresses := self._find(target.host, target.port):  # one without any may get some until it is called
            check_reach(target, addresses, self._allowed)

    def _media(self, request: JobRequest) -> Iterator[Target]:
        for url in remote_urls(_content(request)):
            target = target_of(url)
            # The engine looks at a name again, later: one that we do not know may lead inside by then.
            named = target.literal is None or bool(self._media_hosts)
            if named and not {target.host, ANY_HOST} & self._media_hosts:
                raise AddressRefused(
                    f"{target.host} is none of the hosts that media may come from; the operator names them in "
                    "EGRESS_MEDIA_DOMAINS. Send the content itself, as a data: URL."
                )
            yield target


def _content(request: JobRequest) -> object:
    return request.messages or request.prompt or request.input
