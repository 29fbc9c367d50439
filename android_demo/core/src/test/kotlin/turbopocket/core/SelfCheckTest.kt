// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

import kotlinx.serialization.json.JsonElement
import kotlinx.serialization.json.JsonObject
import kotlinx.serialization.json.JsonPrimitive
import kotlinx.serialization.json.jsonObject
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.io.TempDir
import turbopocket.core.artifact.Artifact
import turbopocket.core.artifact.ComponentSpec
import turbopocket.core.artifact.sha256
import turbopocket.core.drawing.Runtime
import turbopocket.core.drawing.SelfCheck
import turbopocket.core.drawing.Session
import turbopocket.core.drawing.Tensor
import turbopocket.core.onnx.OnnxRuntime
import java.io.File

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

    private fun artifact() = Artifact.open(Scratch(folder).folder)

    /** The golden artifact's record with one value changed. */
    private fun changed(key: String, value: JsonElement): Artifact {
        val scratch = Scratch(folder)
        scratch.set("self_check", JsonObject(scratch.json().getValue("self_check").jsonObject + (key to value)))
        return Artifact.open(folder)
    }

    private fun output(file: String, floor: Int) =
        JsonObject(mapOf("file" to JsonPrimitive(file), "snr_floor_db" to JsonPrimitive(floor)))

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
        assertTrue(result.snrDb.getValue("latents") < 20)
        assertTrue(!SelfCheck(artifact, Wrong(Float.NaN)).run()!!.passed)
    }

    @Test
    fun `what Python's build recorded is met with room to spare`() {
        val result = SelfCheck(artifact(), OnnxRuntime()).run()!!
        assertTrue(result.snrDb.values.min() > 40, "$result")
    }

    @Test
    fun `a floor that nothing meets is refused, with the figure`() {
        val artifact = changed("latents", output("self_check/latents.f32", 500))
        assertRefused("this device computes wrong: latents of the self-check have") {
            SelfCheck(artifact, OnnxRuntime()).requireOnce(seen, "chip")
        }
        assertTrue(!seen.exists())
    }

    @Test
    fun `another picture is refused`() {
        val scratch = Scratch(folder)
        val file = File(folder, "self_check/picture.rgb")
        file.writeBytes(ByteArray(file.length().toInt()) { (255 - it % 256).toByte() })
        scratch.setFile("self_check/picture.rgb", "sha256" to JsonPrimitive(sha256(file)))
        assertRefused("this device computes wrong: picture of the self-check have") {
            SelfCheck(Artifact.open(folder), OnnxRuntime()).requireOnce(seen, "chip")
        }
    }

    @Test
    fun `records that do not fit are refused`() {
        assertRefused("self_check is of step 99") { SelfCheck(changed("step", JsonPrimitive(99)), OnnxRuntime()).run() }
        val other = changed("latents", output("self_check/picture.rgb", 20))
        assertRefused("self_check/picture.rgb has") { SelfCheck(other, OnnxRuntime()).run() }
        File(folder, "self_check/picture.rgb").appendBytes(ByteArray(4))
        assertRefused("self_check/picture.rgb has") { Artifact.open(folder) }
    }

    @Test
    fun `an artifact without a record is not asked`() {
        Scratch(folder).set("self_check", null)
        assertNull(SelfCheck(Artifact.open(folder), OnnxRuntime()).run())
    }
}
