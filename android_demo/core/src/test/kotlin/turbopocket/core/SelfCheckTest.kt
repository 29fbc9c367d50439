// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.ComponentSpec
import turbopocket.core.drawing.Drawer
import turbopocket.core.drawing.Runtime
import turbopocket.core.drawing.SelfCheck
import turbopocket.core.drawing.Session
import turbopocket.core.drawing.Tensor
import turbopocket.core.drawing.Wish
import turbopocket.core.onnx.OnnxRuntime
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** A device that computes wrong draws nothing. */
class SelfCheckTest {
    @TempDir lateinit var folder: File
    @TempDir lateinit var memory: File

    private val seen get() = File(memory, "devices")

    /** A runtime whose denoiser is off by a share of its output. */
    private class Wrong(private val share: Float) : Runtime {
        private val own = OnnxRuntime()
        override val target = own.target
        var opened = 0

        override fun open(component: String, spec: ComponentSpec, file: File): Session {
            opened += 1
            val session = own.open(component, spec, file)
            return object : Session by session {
                override fun run(inputs: Map<String, Tensor>) = session.run(inputs).mapValues { (_, tensor) ->
                    if (component != "unet") tensor
                    else Tensor(tensor.shape, FloatArray(tensor.values.size) { tensor.values[it] * (1 + share) })
                }
            }
        }
    }

    private fun artifact(step: Int = 1): Artifact {
        val scratch = Scratch(folder)
        val latents = Drawer(Artifact.open(folder), OnnxRuntime()).latents(Wish("a red circle", 3), step + 1)
        val bytes = ByteBuffer.allocate(4 * latents.size).order(ByteOrder.LITTLE_ENDIAN)
        latents.forEach(bytes::putFloat)
        scratch.add("self_check.bin", bytes.array())
        scratch.set(
            "self_check",
            JsonObject(
                mapOf(
                    "prompt" to JsonPrimitive("a red circle"),
                    "seed" to JsonPrimitive(3),
                    "step" to JsonPrimitive(step),
                    "file" to JsonPrimitive("self_check.bin"),
                    "snr_floor_db" to JsonPrimitive(60),
                ),
            ),
        )
        return Artifact.open(folder)
    }

    @Test
    fun `a device that computes right passes, and is asked once`() {
        val artifact = artifact()
        val runtime = Wrong(0f)
        SelfCheck(artifact, runtime).requireOnce(seen, "chip A")
        val opened = runtime.opened
        assertTrue(opened > 0)
        SelfCheck(artifact, runtime).requireOnce(seen, "chip A")
        assertEquals(opened, runtime.opened)
        SelfCheck(artifact, runtime).requireOnce(seen, "chip B")
        assertEquals(2 * opened, runtime.opened)
    }

    @Test
    fun `a device that computes wrong is told its figure, each time`() {
        val artifact = artifact()
        repeat(2) {
            assertRefused("this device computes wrong:") { SelfCheck(artifact, Wrong(0.5f)).requireOnce(seen, "chip") }
        }
        val result = SelfCheck(artifact, Wrong(0.5f)).run()!!
        assertTrue(result.snrDb < 60 && result.snrDb > 0)
        assertTrue(!SelfCheck(artifact, Wrong(Float.NaN)).run()!!.passed)
    }

    @Test
    fun `records that do not fit are refused`() {
        artifact(step = 0)
        File(folder, "self_check.bin").appendBytes(ByteArray(4))
        assertRefused("self_check.bin has") { Artifact.open(folder) }
    }

    @Test
    fun `an artifact without a record is not asked`() {
        assertNull(SelfCheck(Artifact.open(File(Golden.all.artifact)), OnnxRuntime()).run())
    }
}
