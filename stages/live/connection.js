// The websocket to the session. Lost, it is opened again until it answers: the session waits, paused.

const MOVED = 4001; // another page has the stage
const WAITS = [300, 600, 1200, 2500]; // milliseconds before the next attempts

// heard: {note(object), binary(buffer), true if that was a view, state("open" | "lost" | "moved")}
export function connect(heard) {
  let socket = null, attempts = 0, views = 0; // that came since it was opened

  function open() {
    socket = new WebSocket(`ws://${location.host}/session`);
    socket.binaryType = "arraybuffer";
    const mine = socket;
    views = 0;
    socket.onopen = () => { attempts = 0; heard.state("open"); };
    socket.onmessage = ({ data }) => {
      if (mine !== socket) return;
      if (typeof data === "string") heard.note(JSON.parse(data));
      else if (heard.binary(data)) views += 1;
    };
    socket.onclose = ({ code }) => {
      if (mine !== socket) return;
      heard.state(code === MOVED ? "moved" : "lost");
      if (code !== MOVED) setTimeout(open, WAITS[Math.min(attempts, WAITS.length - 1)]);
      attempts += 1;
    };
  }

  open();
  return {
    open,
    // False if there is no connection.
    send(message) {
      if (socket.readyState !== WebSocket.OPEN) return false;
      socket.send(JSON.stringify(message));
      return true;
    },
    // The latest view is drawn: the session may go on.
    seen() { this.send({ do: "seen", value: views }); },
  };
}
