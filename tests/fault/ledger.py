"""tmp"""

import re


def pattern_of(key: str) -> str:
    return re.sub(r"[0-9a-f]{32}", "*", key)
