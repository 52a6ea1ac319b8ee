"""XID classes of the NVIDIA driver. Data, dated; pure.

Source: NVIDIA's XID catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html,
Ampere and later), column "immediate action", as of the date below. Where the driver names its own
recovery action (field 230) that goes first.
"""

from typing import Literal

CATALOG_DATE = "2025-10-29"
XidClass = Literal["application", "ignore", "reset_gpu", "reboot", "inspect", "unknown"]

_CLASSES: dict[XidClass, frozenset[int]] = {
    "application": frozenset(
        {8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 68, 69, 70, 71, 72, 75, 76, 77, 80}
        | {82, 83, 84, 85, 86, 88, 89, 94}
        | set(range(96, 106))
        | set(range(126, 136))
        | {139}
    ),
    "ignore": frozenset(
        {14, 37, 38, 43, 44, 63, 66, 67, 92, 93, 106, 107, 108, 121, 137, 141}
        | {152, 153, 154, 157, 160, 161}
    ),
    "reset_gpu": frozenset(
        {46, 48, 62, 64, 74, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158}
        | set(range(144, 151))
    ),
    "reboot": frozenset({79, 151}),
    "inspect": frozenset({54, 171, 172, 173}),
}
# 45 is what a killed process leaves on the GPU: our own clean-up makes thousands of them.
_CLEANUP = 45

MEANING = {
    13: "graphics engine exception",
    31: "GPU memory page fault",
    43: "GPU stopped processing",
    48: "double-bit ECC error",
    63: "row remap recorded",
    64: "row remap failed",
    74: "NVLink error",
    79: "GPU has fallen off the bus",
    92: "high single-bit ECC error rate",
    94: "contained ECC error",
    95: "uncontained ECC error",
    109: "context switch timeout",
    119: "GSP RPC timeout",
    120: "GSP error",
    140: "unrecovered ECC error",
    151: "key rotation error",
    154: "recovery action changed",
}


def classify(code: int) -> XidClass:
    """What the catalogue says to do at once about this code."""
    if code == _CLEANUP:
        return "ignore"
    for name, codes in _CLASSES.items():
        if code in codes:
            return name
    return "unknown"


def meaning(code: int) -> str:
    return MEANING.get(code, "see NVIDIA's XID catalogue")
