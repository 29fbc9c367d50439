// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertThrows
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.ComponentSpec
import turbopocket.core.drawing.Cancellation
import turbopocket.core.drawing.Drawer
import turbopocket.core.drawing.Progress
import turbopocket.core.drawing.Runtime
import turbopocket.core.drawing.Session
import turbopocket.core.drawing.Tensor
import turbopocket.core.drawing.Wish
import turbopocket.core.onnx.OnnxRuntime
import java.io.File
import kotlin.concurrent.thread

/** Cancelling at each place of a drawing, and what is left in memory. */
class CancelTest {
    private val artifact = Artifact.open(File(Golden.all.artifact))
    private val wish = Wish("a red circle", 0)

    /** ONNX Runtime, with a hook before each opening and each run; counts what is open. */
    private class Watched(private val at: (String) -> Unit) : Runtime {
        private val own = OnnxRuntime(threads = 1)
        override val target = own.target
        var open = 0
        var most = 0
        var events = 0

        override fun open(component: String, spec: ComponentSpec, file: File): Session {
            happened("open $component")
            val session = own.open(component, spec, file)
            open += 1
            most = maxOf(most, open)
            return object : Session by session {
                override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
                    happened("run $component")
                    return session.run(inputs)
                }

                override fun close() {
                    open -= 1
                    session.close()
                }
            }
        }

        private fun happened(what: String) {
            events += 1
            at(what)
        }
    }

    @Test
    fun `one component at a time is open, or all`() {
        val one = Watched {}.also { Drawer(artifact, it, keepOpen = false).draw(wish) }
        assertEquals(1 to 0, one.most to one.open)
        val all = Watched {}.also { Drawer(artifact, it, keepOpen = true).draw(wish) }
        assertEquals(artifact.manifest.components.size to 0, all.most to all.open)
    }

    @Test
    fun `progress ends at its total`() {
        val seen = ArrayList<Progress>()
        Drawer(artifact, OnnxRuntime()).draw(wish, progress = seen::add)
        assertEquals(seen.map { it.done }.sorted(), seen.map { it.done })
        assertEquals(seen.last().total, seen.last().done)
        assertEquals("vae_decoder", seen.last().component)
    }

    @Test
    fun `cancelled at any opening or run nothing stays open`() {
        val all = Watched {}.also { Drawer(artifact, it).draw(wish) }.events
        assertTrue(all >= 8)
        for (place in 1..all) {
            val cancellation = Cancellation()
            var count = 0
            val runtime = Watched { if (++count == place) cancellation.cancel() }
            assertThrows(Cancelled::class.java) { Drawer(artifact, runtime).draw(wish, cancellation) }
            assertEquals(0, runtime.open)
            assertEquals(place, runtime.events, "something began after the cancellation")
        }
    }

    @Test
    fun `a run that another thread stops ends as cancelled`() {
        val spec = artifact.manifest.components.getValue("vae_decoder")
        val session = OnnxRuntime(threads = 1).open("vae_decoder", spec, artifact.componentFile("vae_decoder"))
        session.use {
            val many = 1024 // of which one call takes seconds
            val z = Tensor(intArrayOf(many, 4, 16, 16), FloatArray(many * 4 * 16 * 16))
            val begun = System.nanoTime()
            val stopper = thread {
                Thread.sleep(200)
                it.stop()
            }
            assertThrows(Cancelled::class.java) { it.run(mapOf("latent_sample" to z)) }
            stopper.join()
            assertTrue(System.nanoTime() - begun < 20e9)
        }
    }

    @Test
    fun `fifty cancelled drawings leave no native memory`() {
        val places = Watched {}.also { Drawer(artifact, it).draw(wish) }.events
        // The first drawings load classes, compile them and warm the C library's allocator up.
        repeat(50) { cancelledAt(it % places + 1) }
        val before = nativeBytes()
        repeat(50) { cancelledAt(it % places + 1) }
        val after = nativeBytes()
        println("resident beside the heap after 50 cancelled drawings: $after bytes, $before before")
        assertTrue(after <= before * 1.05, "$after bytes are resident, $before were before")
    }

    private fun cancelledAt(place: Int) {
        val cancellation = Cancellation()
        var count = 0
        val runtime = Watched { if (++count == place) cancellation.cancel() }
        assertThrows(Cancelled::class.java) { Drawer(artifact, runtime).draw(wish, cancellation) }
    }

    /** Resident memory but the heap, all of which is touched from the start (see pom.xml). */
    private fun nativeBytes(): Long {
        repeat(3) { System.gc() }
        val pages = File("/proc/self/statm").readText().split(' ')[1].toLong()
        return pages * 4096 - java.lang.Runtime.getRuntime().totalMemory()
    }
}
