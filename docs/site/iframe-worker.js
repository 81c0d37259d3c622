// The search runs in a worker, which a page that is opened from the disk may not start. There a hidden frame takes its
// place: it loads the worker's script, and messages go to and fro as with a worker.
window.IFrameWorker = class extends EventTarget {
  constructor(url) {
    super();
    this.frame = document.createElement("iframe");
    this.frame.hidden = true;
    document.body.append(this.frame);
    const inner = this.frame.contentWindow;
    window.addEventListener("message", (event) => {
      if (event.source !== inner) return;
      const received = new MessageEvent("message", { data: event.data });
      this.dispatchEvent(received);
      if (this.onmessage) this.onmessage(received);
    });
    inner.document.open();
    inner.document.write(
      `<script>postMessage = (data) => parent.postMessage(data, "*")</script><script src="${encodeURI(url)}"></script>`,
    );
    inner.document.close();
    this.loaded = new Promise((done) => (inner.onload = done));
  }

  postMessage(data) {
    this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
  }

  terminate() {
    this.frame.remove();
  }
};
if (location.protocol === "file:") window.Worker = window.IFrameWorker;
