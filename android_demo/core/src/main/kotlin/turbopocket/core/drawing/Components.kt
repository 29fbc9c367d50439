// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.component
import turbopocket.core.refuse

/**
 * The open components of an artifact: all that were used, or with [keepOpen] false the last alone, so that the memory
 * needed is that of the largest. [close] frees all.
 */
internal class Components(
    private val artifact: Artifact,
    private val runtime: Runtime,
    private val keepOpen: Boolean,
    private val cancellation: Cancellation,
) : AutoCloseable {
    private val sessions = LinkedHashMap<String, Session>()

    /** One output of a component. */
    fun run(component: String, inputs: Map<String, Tensor>, output: String): Tensor =
        run(component, inputs)[output] ?: refuse("$component has no output $output")

    /** All outputs of a component by name. */
    fun run(component: String, inputs: Map<String, Tensor>): Map<String, Tensor> {
        cancellation.check()
        val session = sessions[component] ?: open(component)
        return cancellation.during(session::stop) { session.run(inputs) }
    }

    private fun open(component: String): Session {
        if (!keepOpen) close()
        requireMemory(component)
        val file = artifact.componentFile(component)
        cancellation.check()
        return runtime.open(component, artifact.manifest.component(component), file).also { sessions[component] = it }
    }

    private fun requireMemory(component: String) {
        val needed = artifact.componentBytes(component)
        val available = runtime.availableBytes() ?: return
        if (needed > available) {
            refuse(
                "$component needs ${megabytes(needed)} of memory for its weights alone, " +
                    "and ${megabytes(available)} are free",
            )
        }
    }

    override fun close() {
        sessions.values.forEach { it.close() }
        sessions.clear()
    }
}

/** Bytes as words, in millions. */
fun megabytes(bytes: Long): String = String.format(java.util.Locale.ROOT, "%.1f MB", bytes / 1e6)
