// Search in pages that are opened from the file system. Browsers start no Worker there, so this one runs its script in a
// hidden frame. The name of this file tells the theme's offline plugin that it need not load such a script from a server.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      const inside = frame.contentWindow
      const base = new URL(url, document.baseURI)
      const load = (source) =>
        new Promise((loaded, failed) => {
          const script = inside.document.createElement("script")
          Object.assign(script, { src: new URL(source, base), onload: loaded, onerror: failed })
          inside.document.head.append(script)
        })
      inside.importScripts = (...sources) => Promise.all(sources.map(load))
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside = inside
      this.ready = load(base)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })))
    }
  }
}
