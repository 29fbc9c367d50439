// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.drawing

import turbopocket.core.artifact.ComponentSpec
import turbopocket.core.artifact.Manifest
import java.io.File

/** What opens the files of an artifact of one [target]. */
interface Runtime {
    /** The manifest's word for artifacts that it opens. */
    val target: String

    /** The component in [file], verified before. Throws Refused where file and [spec] disagree, or it does not open. */
    fun open(component: String, spec: ComponentSpec, file: File): Session

    /** Bytes of memory that may still be used, or null where nobody knows. */
    fun availableBytes(): Long? = null
}

/** One open component; native memory is free after [close]. */
interface Session : AutoCloseable {
    /** All outputs by name. Throws Refused for inputs that are not the spec's, Cancelled after [stop]. */
    fun run(inputs: Map<String, Tensor>): Map<String, Tensor>

    /** Ends a run that goes on in another thread, as soon as the runtime can. */
    fun stop()
}

/** Throws Refused when the runtime is for artifacts of another kind. */
internal fun Runtime.requireTarget(manifest: Manifest) {
    if (manifest.target != target) {
        turbopocket.core.refuse("${manifest.name} was built for ${manifest.target}; $target artifacts are opened here")
    }
}
