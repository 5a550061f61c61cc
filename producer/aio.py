"""placeholder while being written"""


class AsyncCancelClient: ...


class AsyncTicket: ...
