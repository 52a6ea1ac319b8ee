"""Ask a fleet of this user something and print the answer: python chat.py FLEET [QUESTION]

With the official client it is the same in a few lines; see README.md.
"""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path


def main() -> int:
    fleet = sys.argv[1]
    question = sys.argv[2] if len(sys.argv) > 2 else "The quick brown fox"
    launcher = str(Path(sys.executable).with_name("launcher"))
    status = json.loads(
        subprocess.run(
            [launcher, "status", "--fleet", fleet, "--json"], stdout=subprocess.PIPE, check=True
        ).stdout
    )
    request = urllib.request.Request(
        f"{status['endpoint']}/chat/completions",
        data=json.dumps(
            {
                "model": fleet,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 16,
                "temperature": 0,
            }
        ).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": f"Bearer {Path(status['api_key_file']).read_text().strip()}",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        completion = json.load(answer)
    print(f"endpoint:   {status['endpoint']}")
    print(f"completion: {completion['choices'][0]['message']['content']!r}")
    print(f"tokens:     {completion['usage']['completion_tokens']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
