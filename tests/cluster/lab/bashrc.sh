umask 002
# ~/.bashrc as on Vast.ai: the umask of its base image, a greeting, and the lines that put every session into tmux.
# bash reads it for the commands of ssh as well.
case $- in *i*)
  echo "Welcome to vast.ai. If authentication fails, try again after a few seconds."
  echo "Have fun!"
  ;;
esac
if [ ! -f ~/.no_auto_tmux ] && [ -z "$TMUX" ] && [ -n "$SSH_CONNECTION" ]; then
  tmux attach-session -t ssh_tmux || tmux new-session -s ssh_tmux
  exit
fi
