"""The way to the exchange of whoever makes one call at a time (a stock RQ worker, `check`): by requests.

Its adapter alone is used, and not its sessions: those would follow redirects, keep cookies and look at the environment.

Only what requests and urllib3 document is used, so less is known than in an event loop: a request is signed before a
new connection is opened, and every error that does not prove the opposite counts as perhaps seen. What proves it is
told by urllib3's errors alone. An error that is none of theirs, such as RQ's own time-out, passes through.
"""

from __future__ import annotations

import logging
import re
import ssl
import sys
import time
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3 import Timeout
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError

from worker.classify import NO_ANSWER
from worker.clock import local_ns
from worker.transport import FIELDS, IDLE_BOUND_S, Failed, Raw, Request, Route, decoded, named

__all__ = ["RequestsTransport"]

#: What urllib3 logs may quote the URL of a request, with its signature.
_TALKATIVE = ("connection", "connectionpool", "poolmanager", "response", "util.retry")
#: Raised before a request can be written: no connection to exchange or proxy (a name without an address is one kind
#: of it), and a certificate that is not accepted. ProxyError is none: urllib3 calls an answer that breaks off so, too.
_NOT_CONNECTED = (ConnectTimeoutError, NewConnectionError)
#: What http.client says where the proxy refused the tunnel.
_TUNNEL_STATUS = re.compile(r"^Tunnel connection failed: ([0-9]{3})\b")
#: More layers than any library wraps around an error: a cycle of causes must not hold us.
_LAYERS = 10
#: Most bytes of one read of a body.
_READ_SIZE = 16 * 1024


def _shows_no_signed_url(record: logging.LogRecord) -> bool:
    return "signature=" not in record.getMessage()


class _Adapter(HTTPAdapter):
    """Requests' adapter with TLS and login of the route."""

    def __init__(self, route: Route) -> None:
        self._tls: dict[str, Any] = {"ssl_context": route.tls}
        self._login = route.proxy_fields
        super().__init__(pool_connections=1, pool_maxsize=1)

    def init_poolmanager(self, connections: int, maxsize: int, block: bool = False, **options: Any) -> None:
        super().init_poolmanager(connections, maxsize, block, **options, **self._tls)

    def proxy_manager_for(self, proxy: Any, **options: Any) -> Any:
        return super().proxy_manager_for(proxy, **options, **self._tls, proxy_ssl_context=self._tls["ssl_context"])

    def proxy_headers(self, proxy: str) -> dict[str, str]:  # noqa: ARG002 - there is one proxy
        return self._login


class RequestsTransport:
    """Requests one after the other; see :class:`worker.transport.Transport`. The coroutine of a call waits in it.

    ``idle_bound_s`` is how long its connection is kept when nobody uses it, seconds.

    The time that a name look-up takes is not bounded, nor how long a head may go on that comes byte by byte.
    """

    def __init__(self, route: Route, *, idle_bound_s: float = IDLE_BOUND_S) -> None:
        for name in _TALKATIVE:
            logging.getLogger(f"urllib3.{name}").addFilter(_shows_no_signed_url)
        self._base_url = route.base_url
        # urllib3 adds the authorities to the context's own; its default would add those that were replaced.
        self._ways: dict[str, Any] = {"verify": route.ca_file}
        if route.proxy is not None:
            proxy = f"{'https' if route.proxy.secure else 'http'}://{route.proxy.authority}"
            self._ways["proxies"] = {"https": proxy}
        # urllib3's TLS within TLS reads ahead, where nobody sees what came behind an answer.
        self._keeps = route.proxy is None or not route.proxy.secure
        self._idle_bound_ns = round(idle_bound_s * 1e9)
        self._used_ns = local_ns()
        self._is_closed = False
        self._adapter = _Adapter(route)

    async def send(self, make: Callable[[], Request | None], patience_s: float) -> Raw | Failed | None:
        """See :meth:`worker.transport.Transport.send`; ``make`` is called before a connection is opened. Any answer is
        waited for until the attempt's end: nothing else can be done meanwhile."""
        if self._is_closed:
            return Failed(False, "could not connect: ConnectionAbortedError")
        outer = sys.exception()
        try:
            if (request := make()) is None:
                return None
            prepared = self._prepared(request)
        except (ValueError, TypeError, OSError) as error:  # its text may hold what it was to sign
            return Failed(False, named("not sent", error))
        if local_ns() - self._used_ns > self._idle_bound_ns:
            self._adapter.close()
        try:
            return self._exchanged(prepared, patience_s, request.body_limit)
        except (requests.RequestException, HTTPError, OSError) as error:
            return _failed(error, outer)
        except BaseException as error:
            # What the libraries were handling when it came may say the signed URL.
            error.__context__ = None
            raise
        finally:
            self._used_ns = local_ns()

    def close(self) -> None:
        """See :meth:`worker.transport.Transport.close`."""
        self._is_closed = True
        self._adapter.close()

    def _prepared(self, request: Request) -> requests.PreparedRequest:
        url, fields = f"{self._base_url}{request.target}", {**FIELDS, **dict(request.fields)}
        prepared = requests.Request(request.method, url, fields).prepare()
        prepared.headers.pop("Content-Length", None)  # requests tells the length of a body that is not there
        return prepared

    def _exchanged(self, prepared: requests.PreparedRequest, patience_s: float, body_limit: int) -> Raw:
        ends_at_s = time.monotonic() + patience_s
        sent_ns = local_ns()
        # What is sent shall have time to be answered: a request that never left can be tried again without doubt.
        bound: Any = Timeout(total=patience_s, connect=patience_s / 2)  # as its documentation allows
        with self._adapter.send(prepared, stream=True, timeout=bound, **self._ways) as response:
            received_ns = local_ns()
            headers = {name.lower(): value.strip() for name, value in response.headers.items()}
            body, is_whole = _body(response, ends_at_s, body_limit)
        is_whole = is_whole and not {"content-length", "transfer-encoding"} <= set(headers)
        if response.status_code < 200 or not (is_whole and self._keeps):
            # The true answer may still come, and must not be taken for the next one's.
            self._adapter.close()
        body, is_whole = decoded(headers, body, is_whole, body_limit)
        return Raw(response.status_code, headers, body, is_whole, sent_ns, received_ns)


def _body(response: requests.Response, ends_at_s: float, limit: int) -> tuple[bytes, bool]:
    """What there is of the body, as it came, and whether that is all: one that breaks off has a status all the same."""
    body = bytearray()
    is_whole = True
    try:
        while data := response.raw.read1(_READ_SIZE, decode_content=False):
            body += data
            if len(body) > limit or time.monotonic() > ends_at_s:
                is_whole = False
                break
    except (requests.RequestException, HTTPError, OSError):
        is_whole = False
    return bytes(body[:limit]), is_whole


def _failed(error: Exception, outer: BaseException | None) -> Failed:
    """What became of a request; ``outer`` is what was being handled before it, which is no cause of its failure."""
    layers = [error]
    while len(layers) < _LAYERS:
        inner = layers[-1].__cause__ or layers[-1].__context__
        if not isinstance(inner, Exception) or inner is outer:
            break
        layers.append(inner)
    root = layers[-1]
    for layer in layers:
        if isinstance(layer, _NOT_CONNECTED):
            return Failed(False, named("could not connect", root))
        if isinstance(layer, ssl.SSLCertVerificationError):
            return Failed(False, named("no TLS session", root))
        # How http.client says that a proxy refused the tunnel; the system's own errors have a number.
        if type(layer) is OSError and layer.errno is None:
            refused = _TUNNEL_STATUS.search(str(layer))
            return Failed(False, f"no tunnel through the proxy: {refused[1] if refused else type(root).__name__}")
    return Failed(True, named(NO_ANSWER, root))
