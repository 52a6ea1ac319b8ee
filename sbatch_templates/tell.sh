# What is about to be exec'ed, for the agent to read: how many words, the words, the environment.
tell() {
  printf 'LAUNCHER-TELL\0'
  printf '%s\0' "$#" "$@"
  env -0
  printf 'LAUNCHER-TOLD\0'
}
