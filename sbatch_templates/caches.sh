# --- compile caches: what is started is first given a folder for them, inside its environment --------
ENGINE+=(python3 -c 'import os; exec(os.environ["LAUNCHER_CACHES"])')
