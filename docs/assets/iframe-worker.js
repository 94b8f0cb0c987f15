// Search without a server: browsers start no Worker for a page that was opened from a folder, so there an iframe does its work.
// The theme's search looks for the name IFrameWorker in its parent.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      const place = () => {
        document.body.append(this.frame)
        const inside = this.frame.contentDocument
        inside.open()
        inside.write(
          "<!doctype html><body><script>" +
            "postMessage = data => parent.postMessage(data, '*');" +
            "importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {" +
            "const script = document.createElement('script'); script.src = url; script.onload = done; script.onerror = failed;" +
            "document.body.append(script) })), Promise.resolve())" +
            `</script><script src="${new URL(url, location.href)}"></script></body>`,
        )
        inside.close()
        this.frame.contentWindow.addEventListener("load", () => {
          this.ready = true
          this.waiting.splice(0).forEach(data => this.postMessage(data))
        })
      }
      document.body ? place() : addEventListener("DOMContentLoaded", place)
      this.heard = event => {
        if (event.source !== this.frame.contentWindow) return
        const told = new MessageEvent("message", { data: event.data })
        this.dispatchEvent(told)
        this.onmessage?.(told)
      }
      addEventListener("message", this.heard)
    }

    postMessage(data) {
      if (this.ready) this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
      else this.waiting.push(data)
    }

    terminate() {
      removeEventListener("message", this.heard)
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
