const players = [...document.querySelectorAll('audio')];
for (const player of players) {
  player.addEventListener('play', () => players.forEach(other => other === player || other.pause()));
}
for (const button of document.querySelectorAll('button[data-switch]')) {
  button.hidden = false;
  button.addEventListener('click', () => {
    const pair = [...button.closest('article').querySelectorAll('audio')];
    const from = pair.findIndex(player => !player.paused);
    const to = pair[from === 0 ? 1 : 0];
    if (from >= 0) to.currentTime = Math.min(pair[from].currentTime, to.duration || 0);
    to.play();
  });
}
