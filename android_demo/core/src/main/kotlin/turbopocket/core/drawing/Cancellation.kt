// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.Cancelled

/** Stops a drawing from another thread: between two calls, or within one as soon as the runtime can. */
class Cancellation {
    private var cancelled = false
    private var stop: (() -> Unit)? = null

    /** Whatever is drawn with this ends by [Cancelled]. */
    @Synchronized
    fun cancel() {
        cancelled = true
        stop?.invoke()
    }

    /** Throws Cancelled when it was asked for. */
    @Synchronized
    fun check() {
        if (cancelled) throw Cancelled()
    }

    /** What [block] returns; [stop] is called when somebody cancels meanwhile. */
    internal fun <T> during(stop: () -> Unit, block: () -> T): T {
        synchronized(this) {
            check()
            this.stop = stop
        }
        try {
            return block()
        } finally {
            synchronized(this) { this.stop = null }
        }
    }
}
