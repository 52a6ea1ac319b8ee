# --- from here on static: the engine's environment ---------------------------------------------
# Reads LAUNCHER_MODULES, LAUNCHER_APPTAINER and LAUNCHER_PYXIS (arrays, perhaps empty) and leaves
# in ENGINE the words that stand in front of an engine command.
set -euo pipefail

if [ "${#LAUNCHER_MODULES[@]}" -gt 0 ]; then
  if ! type module >/dev/null 2>&1; then
    for init in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh \
      /usr/share/lmod/lmod/init/bash /usr/share/modules/init/bash; do
      # shellcheck disable=SC1090
      if [ -r "$init" ]; then set +u; . "$init"; set -u; break; fi
    done
  fi
  if ! type module >/dev/null 2>&1; then
    echo "launcher: no environment modules on $(uname -n), but the spec asks for ${LAUNCHER_MODULES[*]}" >&2
    exit 78
  fi
  set +u
  module load "${LAUNCHER_MODULES[@]}"
  set -u
fi

ENGINE=(env)
if [ "${#LAUNCHER_APPTAINER[@]}" -gt 0 ]; then
  ENGINE=(apptainer exec --bind "$LAUNCHER_TMP" --bind "$LAUNCHER_BASE" --bind "$LAUNCHER_CACHE"
    "${LAUNCHER_APPTAINER[@]}")
elif [ "${#LAUNCHER_PYXIS[@]}" -gt 0 ]; then
  ENGINE=(srun --overlap --nodes=1 --ntasks=1 --nodelist="$LAUNCHER_NODE" --no-kill
    "--container-mounts=$LAUNCHER_TMP,$LAUNCHER_BASE,$LAUNCHER_CACHE$LAUNCHER_PYXIS_MOUNTS"
    "${LAUNCHER_PYXIS[@]}")
fi
